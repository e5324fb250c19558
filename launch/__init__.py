"""Runs of several processes or machines. In a checkout at its top; `k25_jax/launch` is a link to it, a wheel has it there."""
