"""glibc's allocator under XLA's CPU programs, which take and give back gigabytes with every call.

As it comes, glibc returns them to the kernel each time, which clears them page by page before the next call. Kept, and
in huge pages, the digits are solved 1.15 and trained 1.2 times as fast (docs/bench.md).
"""

from __future__ import annotations

import importlib.util
import os
import sys

VARIABLE = "GLIBC_TUNABLES"
"""glibc reads it before a process begins, and nothing else sets huge pages."""


def settings(cores: int) -> str:
    """Of glibc 2.35 and later; what an older one does not know it passes over.

    Every large block comes from the main arena, which is never trimmed; another arena for each core, so that threads
    which compile do not wait for each other (with one arena they took 1.1 to 1.3 times as long).
    """
    kept = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=67108864"
    return f"glibc.malloc.hugetlb=1:glibc.malloc.arena_max={cores + 1}:{kept}"


def begin_again() -> None:
    """Replaces this process by one with `settings`: the same command, number and files, some 50 ms later.

    Does nothing where the variable is set already, even to nothing; without glibc; and where jax has an accelerator's
    plugin and is not told to take the CPU: hosts of accelerators have not been measured.
    """
    accelerators = any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
    glibc = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ())
    if VARIABLE in os.environ or not glibc or (accelerators and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return
    os.environ[VARIABLE] = settings(len(os.sched_getaffinity(0)))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
