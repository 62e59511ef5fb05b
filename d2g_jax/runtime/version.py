"""Which d2g_jax this is: setup.cfg has the same."""

__version__ = "0.1.0"
