"""Work that is shared among threads, and given back in order."""

import threading
import time

import pytest

from sae_stability import threads


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_items_and_few_are_made_ahead(workers):
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01 * (item % 3))  # so that some that began later end earlier
        return item * item

    for taken, found in enumerate(threads.in_order(work, range(20), workers)):
        assert found == taken**2
        assert len(begun) <= taken + workers + 1


def test_as_many_items_as_workers_are_worked_on_at_a_time():
    meet = threading.Barrier(2, timeout=10)  # which one alone would wait at
    assert len(list(threads.in_order(lambda item: meet.wait(), range(4), 2))) == 4


def test_an_error_comes_in_its_place_and_who_stops_early_leaves_no_thread():
    before = threading.active_count()
    results = threads.in_order(lambda item: 1 // item, [1, 1, 0, 1], 2)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    stopped = threads.in_order(lambda item: item, range(100), 2)
    next(stopped)
    stopped.close()
    assert threading.active_count() == before
