"""How many threads may work, and work spread over them in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
R = TypeVar("R")


def available_threads() -> int:
    """Return the number of threads that BLAS may use now: who limits those means these as well."""
    found = [int(pool["num_threads"]) for pool in pools().info() if pool["user_api"] == "blas"]
    return min([_cores(), *found])


def in_order(work: Callable[[T], R], items: Iterable[T], n_threads: int) -> Iterator[R]:
    """Yield ``work(item)`` of each item, in order; at most ``n_threads`` of them are worked on."""
    if n_threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) == n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@cache
def pools() -> Any:
    """Return the thread pools of this process; to find them takes some milliseconds."""
    return ThreadpoolController()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
