"""Work done in advance by threads while somebody else, mostly a model, is busy with what came before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    call: Callable[[Item], Result], items: Iterable[Item], *, depth: int, num_threads: int
) -> Generator[Result, None, None]:
    """`call` of each item, in their order, computed in advance.

    Args:
        call: runs in the threads; what it raises is raised here, in the place of its result.
        items: read in the thread that iterates.
        depth: so many results are computed or being computed beyond the last that was taken.
        num_threads: how many threads.

    Yields:
        One result per item. When the iteration ends or is given up, what has not begun is not done any more.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
