"""The `d2g` command's jobs, a file each: its flags, and one call. Nothing but `__main__` imports this wing.

What all jobs have in common is `common.py`. No file imports jax before the flags are read.
"""
