"""A map by several threads: order, how far it runs ahead, errors, and sums to the last bit."""

import threading
import time

import numpy as np
import pytest

from hibio.data.counts import ordered_map
from preprocessing.errors import DataError


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_inputs(threads):
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 / (1 + number))
        return number * number

    assert list(ordered_map(slow_at_first, range(12), threads)) == [n * n for n in range(12)]
    assert list(ordered_map(slow_at_first, [], threads)) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_it_runs_a_few_inputs_ahead_and_no_further(threads):
    read = []

    def inputs():
        for number in range(100):
            read.append(number)
            yield number

    results = ordered_map(str, inputs(), threads)
    assert read == []
    for number in range(5):
        assert next(results) == str(number)
        assert len(read) <= number + threads + 1
    results.close()
    assert len(read) < 20


def test_it_works_at_several_inputs_at_a_time():
    """Three calls wait for each other: one thread alone would never come back."""
    meet = threading.Barrier(3, timeout=30)
    assert list(ordered_map(lambda n: (meet.wait(), n)[1], range(3), 3)) == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_is_raised_in_its_place_and_ends_the_work(threads):
    begun = []

    def fails_at_three(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise DataError("slide 3")
        return number

    results = ordered_map(fails_at_three, range(1000), threads)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="slide 3"):
        next(results)
    assert len(begun) < 20


def test_sums_in_its_order_are_the_same_to_the_last_bit():
    rng = np.random.default_rng(0)
    values = rng.normal(size=500) * 10.0 ** rng.uniform(-8, 8, 500)
    alone = sum(ordered_map(np.square, list(values), 1))
    assert sum(ordered_map(np.square, list(values), 7)) == alone
    assert sum(np.square(values[::-1])) != alone  # the order does matter here


def test_no_threads():
    with pytest.raises(DataError, match="threads is 0, expected at least 1"):
        list(ordered_map(str, [1], 0))
