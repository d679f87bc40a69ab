"""Measurements; every module has `main(argv)` and is run by `python -m dcae_jax bench <name>`."""
