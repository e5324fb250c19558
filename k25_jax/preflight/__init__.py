"""Compile the training step ahead of time, for chips that this machine need not have."""
