"""Measures this machine: `bench autoencoder` (its fast forms), `bench masking` (what it saves)."""

import importlib
import pkgutil

from dcae_jax import bench
from dcae_jax.errors import UserError


def main(argv: list[str]) -> int:
    """Runs `main(argv[1:])` of dcae_jax/bench/<argv[0]>.py."""
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__))
    if argv and argv[0] in names:
        return importlib.import_module(f"dcae_jax.bench.{argv[0]}").main(argv[1:])
    if argv in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n\nusage: python -m dcae_jax bench NAME [options]; NAME: {names}")
        return 0
    raise UserError(f"there is no benchmark {argv[0]!r}; choose one of {', '.join(names)}")
