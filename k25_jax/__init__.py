"""Kimi K2.5 in JAX."""

__version__ = "0.1.0"
