"""dcae_jax: training of deep compression autoencoders and latent diffusion in JAX / Flax Linen."""

from dcae_jax import store

__version__ = "0.6.0"

store.fresh_listings()
