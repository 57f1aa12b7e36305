"""The micro-batcher, with NumPy in the device's place: what goes together, and what is kept apart."""

import asyncio
import threading
import time

import numpy as np
import pytest

from jaxcls.serving.batcher import Batcher, ExpiredError

SIDE, POISON = 4, 255


class Device:
    """Scores are each image's first pixels; it is slow on request, and fails on poisoned images."""

    def __init__(self):
        self.sizes, self.go_on = [], threading.Event()
        self.go_on.set()

    def __call__(self, images):
        self.sizes.append(len(images))
        assert self.go_on.wait(10)
        if (images == POISON).any():
            raise RuntimeError("the device has failed")
        return images.reshape(len(images), -1)[:, :3].astype(np.float32)


def make_images(n, first=0):
    """n images, each filled with its own number."""
    numbers = np.arange(first, first + n, dtype=np.uint8)
    return np.broadcast_to(numbers[:, None, None, None], (n, SIDE, SIDE, 3)).copy()


def make_batcher(device, seconds=None, **options):
    return Batcher(device, seconds or {1: 0.01, 4: 0.02, 8: 0.03}, 3, **options)


def soon(seconds=10):
    return asyncio.get_running_loop().time() + seconds


async def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def assert_scores(scores, images):
    np.testing.assert_array_equal(scores, images.reshape(len(images), -1)[:, :3])


def test_an_idle_device_takes_what_is_there():
    async def main():
        device = Device()
        images = make_images(1)
        assert_scores(await make_batcher(device).score(images, soon()), images)
        assert device.sizes == [1]

    asyncio.run(main())


def test_what_comes_while_the_device_is_busy_goes_together():
    async def main():
        device = Device()
        batcher = make_batcher(device)
        device.go_on.clear()
        requests = [make_images(n, first) for first, n in ((0, 1), (1, 2), (3, 1), (4, 3), (7, 1))]
        tasks = [asyncio.create_task(batcher.score(images, soon())) for images in requests]
        await until(lambda: device.sizes and batcher.num_waiting == 7)
        device.go_on.set()
        for task, images in zip(tasks, requests, strict=True):
            assert_scores(await task, images)
        assert device.sizes == [1, 8]
        assert batcher.num_waiting == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("num_waiting", "seconds", "expected"),
    [
        (5, {1: 1.0, 4: 1.5, 8: 4.5}, [4, 1]),  # 8 with 3 empty places would be slower than 4 and 1
        (5, {1: 1.0, 4: 1.5, 8: 1.6}, [8]),
        (9, {1: 1.0, 4: 1.5, 8: 1.6}, [8, 1]),
        (3, {1: 1.0, 4: 4.0, 8: 8.0}, [1, 1, 1]),
    ],
)
def test_the_size_is_the_one_that_scores_most_images_a_second(num_waiting, seconds, expected):
    async def main():
        device = Device()
        batcher = make_batcher(device, {size: 1000 * value for size, value in seconds.items()})
        device.go_on.clear()
        tasks = [
            asyncio.create_task(batcher.score(make_images(1, i), soon())) for i in range(1 + num_waiting)
        ]
        await until(lambda: device.sizes and batcher.num_waiting == num_waiting)
        device.go_on.set()
        await asyncio.gather(*tasks)
        assert device.sizes[1:] == expected

    asyncio.run(main())


def test_a_batch_that_was_slow_once_does_not_banish_its_size():
    async def main():
        device = Device()
        batcher = make_batcher(device, {1: 1e-3, 8: 2e-3})
        device.go_on.clear()
        slow = asyncio.create_task(batcher.score(make_images(8), soon()))
        await until(lambda: device.sizes)
        await asyncio.sleep(0.2)
        device.go_on.set()
        await slow
        for _ in range(3):
            await asyncio.gather(*(batcher.score(make_images(1), soon()) for _ in range(8)))
        assert device.sizes == [8, *[1, 8] * 3]

    asyncio.run(main())


def test_a_request_larger_than_the_largest_batch_is_divided():
    async def main():
        device, images = Device(), make_images(19)
        assert_scores(await make_batcher(device).score(images, soon()), images)
        assert sum(device.sizes) >= 19
        assert max(device.sizes) == 8

    asyncio.run(main())


def test_cancelled_and_expired_images_are_dropped_before_they_are_stacked():
    async def main():
        device = Device()
        batcher = make_batcher(device)
        device.go_on.clear()
        first = asyncio.create_task(batcher.score(make_images(1), soon()))
        await until(lambda: device.sizes)
        cancelled = asyncio.create_task(batcher.score(make_images(8, 10), soon()))
        expired = asyncio.create_task(batcher.score(make_images(8, 20), soon(-1)))
        kept = asyncio.create_task(batcher.score(make_images(1, 30), soon()))
        await until(lambda: batcher.num_waiting == 17)
        cancelled.cancel()
        await asyncio.sleep(0)
        device.go_on.set()
        assert_scores(await kept, make_images(1, 30))
        await first
        with pytest.raises(ExpiredError):
            await expired
        assert device.sizes == [1, 1]
        assert batcher.num_waiting == 0

    asyncio.run(main())


def test_an_image_that_the_device_fails_on_fails_alone():
    async def main():
        device = Device()
        batcher = make_batcher(device)
        device.go_on.clear()
        requests = [make_images(1), make_images(2, 1), make_images(2, 3), make_images(1, 5)]
        requests[2][1] = POISON
        tasks = [asyncio.create_task(batcher.score(images, soon())) for images in requests]
        await until(lambda: device.sizes and batcher.num_waiting == 5)
        device.go_on.set()
        scores = [await task for task in tasks]
        for index in (0, 1, 3):
            assert_scores(scores[index], requests[index])
        assert_scores(scores[2][:1], requests[2][:1])
        assert np.isnan(scores[2][1]).all()
        assert not batcher.broken.is_set()
        again = make_images(2)
        again[0] = POISON
        assert np.isnan((await batcher.score(again, soon()))[0]).all()
        assert batcher.broken.is_set()

    asyncio.run(main())


def test_a_broken_device_is_not_tried_with_every_image():
    async def main():
        device, images = Device(), np.full((8, SIDE, SIDE, 3), POISON, np.uint8)
        batcher = make_batcher(device)
        assert np.isnan(await batcher.score(images, soon())).all()
        assert device.sizes == [8, 1, 1]

    asyncio.run(main())


@pytest.mark.parametrize(("max_in_flight", "expected"), [(1, 1), (2, 2)])
def test_no_more_batches_are_in_flight_than_allowed(max_in_flight, expected):
    async def main():
        device = Device()
        batcher = make_batcher(device, max_in_flight=max_in_flight)
        device.go_on.clear()
        tasks = [asyncio.create_task(batcher.score(make_images(8), soon())) for _ in range(5)]
        await until(lambda: len(device.sizes) == expected)
        await asyncio.sleep(0.05)
        assert len(device.sizes) == expected
        device.go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_second_batch_lingers_for_company():
    async def main():
        device = Device()
        batcher = make_batcher(device, {1: 0.02, 4: 0.03}, max_in_flight=2, linger=0.1)
        device.go_on.clear()
        first = asyncio.create_task(batcher.score(make_images(1), soon()))
        await until(lambda: device.sizes)
        started = time.monotonic()
        second = asyncio.create_task(batcher.score(make_images(1, 1), soon()))
        third = asyncio.create_task(batcher.score(make_images(1, 2), soon()))
        await until(lambda: len(device.sizes) == 2)
        assert time.monotonic() - started >= 0.09
        assert device.sizes == [1, 4]
        device.go_on.set()
        await asyncio.gather(first, second, third)

    asyncio.run(main())


def test_what_a_batch_takes_is_measured_again():
    async def main():
        batcher = make_batcher(Device(), {1: 100.0})
        for _ in range(100):
            await batcher.score(make_images(1), soon())
        assert batcher.seconds_per_image < 1

    asyncio.run(main())
