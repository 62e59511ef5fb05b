"""The one exception that means: the input is wrong, and here is the remedy. And what a machine is to blame for."""

import errno

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_LONGEST = 200  # characters of what a library says


class UserError(Exception):
    """Bad input. The message is one line that names the file, key or value and what would be right.

    The `d2g` command prints it on stderr without a traceback and exits with code 2.
    """


def of_the_machine(error: Exception) -> str | None:
    """One line for what any job may meet anywhere: a full disk, too little memory, no such devices; None for the rest.

    Jobs that know which file or setting it was say so themselves, as a `UserError`.
    """
    said = (str(error).strip().splitlines() or [""])[0][:_LONGEST]
    if isinstance(error, OSError) and error.errno in _FULL:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}cannot be written ({error.strerror}); make room, then give the same command again"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in said):
        return f"out of memory ({said or 'of the host'}); take smaller batches or images, or --dtype=bfloat16 to draw"
    if isinstance(error, RuntimeError) and "nable to initialize backend" in said:
        return f"{said}; JAX_PLATFORMS names devices that are not here or whose jax is not installed"
    return None
