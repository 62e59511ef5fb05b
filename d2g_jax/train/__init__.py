"""The distillation job: `setup` by config, compiled `programs`, the `loop` with its effects, and `job`, their order."""

from d2g_jax.train.job import train

__all__ = ["train"]
