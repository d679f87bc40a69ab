"""Diffusion: processes and objectives, samplers, guidance."""
