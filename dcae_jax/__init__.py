"""dcae_jax: training of deep compression autoencoders and latent diffusion in JAX / Flax Linen."""

__version__ = "0.5.0"
