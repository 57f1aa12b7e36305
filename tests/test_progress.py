"""Work in threads: in order, on several, little of it waiting, errors passed on."""

import threading
import time

import pytest

from jaxcls import progress
from jaxcls.progress import map_threads


@pytest.mark.parametrize("count", [0, 1, 5, 255, 256, 1000, 70_000])
def test_results_come_in_order(count):
    assert list(map_threads(lambda index: index * index, count, None)) == [i * i for i in range(count)]


def test_even_two_calls_run_at_once():
    barrier = threading.Barrier(2, timeout=60)
    assert sorted(map_threads(lambda index: barrier.wait(), 2, "waiting")) == [0, 1]


def test_an_error_ends_the_work():
    done = []

    def work(index):
        done.append(index)
        if index == 300:
            raise KeyError("photo 300")
        time.sleep(1e-4)  # so that the rest would take a minute
        return index

    with pytest.raises(KeyError, match="photo 300"):
        list(map_threads(work, 500_000, None))
    assert len(done) < 100_000


def test_a_million_calls_are_few_tasks(monkeypatch):
    """Each task that waits takes a kilobyte."""
    submitted = []

    class Pool(progress.ThreadPoolExecutor):
        def submit(self, *arguments, **options):
            submitted.append(arguments)
            return super().submit(*arguments, **options)

    monkeypatch.setattr(progress, "ThreadPoolExecutor", Pool)
    assert sum(map_threads(lambda index: 1, 1_000_000, None)) == 1_000_000
    assert len(submitted) < 4000
