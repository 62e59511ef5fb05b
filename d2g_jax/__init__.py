"""Diffusion2GAN in JAX: distil a diffusion model into a one-step conditional GAN."""

__version__ = "0.1.0"
