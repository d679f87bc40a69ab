"""Sweeps: many runs of one config, each a process of its own.  `launch/sweep.py` is the command.

No module here imports jax when it is imported; drawing the page and reading a config do.
"""
