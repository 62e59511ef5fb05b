"""The next item made while the caller is busy with one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def one_ahead(items: Iterable[T]) -> Iterator[Iterator[T]]:
    """Gives `items` back; while the caller has one, the next is made in a thread. Leaving waits for that one."""
    source, end = iter(items), object()

    def pass_on() -> Iterator[T]:
        following = pool.submit(next, source, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, source, end)
            yield item

    with ThreadPoolExecutor(1) as pool:
        yield pass_on()
