"""Work done in advance by threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from fpn_det.ahead import ahead


def test_results_come_in_order() -> None:
    def slow_at_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert list(ahead(slow_at_first, range(20), depth=4, num_threads=3)) == [i * i for i in range(20)]
    assert list(ahead(slow_at_first, [], depth=4, num_threads=3)) == []


def test_work_is_done_in_advance_but_bounded() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in count():
            taken.append(i)
            yield i

    second = threading.Event()

    def call(i: int) -> int:
        if i == 1:
            second.set()
        return i

    results = ahead(call, items(), depth=3, num_threads=2)
    assert next(results) == 0
    assert second.wait(10)  # though nobody asked for it yet
    assert taken == [0, 1, 2, 3]
    results.close()
    assert taken == [0, 1, 2, 3]


def test_an_error_comes_in_the_place_of_its_result() -> None:
    def fails_at_two(i: int) -> int:
        if i == 2:
            raise ValueError("two")
        return i

    results = ahead(fails_at_two, range(5), depth=2, num_threads=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_what_has_not_begun_is_given_up() -> None:
    begun: list[int] = []
    release = threading.Event()

    def call(i: int) -> int:
        begun.append(i)
        if i:
            release.wait(10)
        return i

    results = ahead(call, range(100), depth=50, num_threads=1)
    assert next(results) == 0
    threading.Timer(0.05, release.set).start()
    results.close()
    assert len(begun) <= 3
