"""When requests are sent, by the event loop's own clock."""

import asyncio
from collections import Counter

import pytest

from jaxcls.data.pacing import Limits, Pacer
from jaxcls.errors import DownloadError, UsageError


def run(limits: Limits, plan: list[tuple[str, list]]) -> tuple[list, list[tuple[str, float]]]:
    """Send a request for each (host, outcomes), all at once; their ends, (host, seconds) of each start."""
    starts = []

    async def send(pacer: Pacer, host: str, outcomes: list):
        async def request():
            async with pacer.turn(host):
                starts.append((host, asyncio.get_running_loop().time() - begin))
                await asyncio.sleep(0.05)
                outcome = outcomes.pop(0)
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

        return await pacer.send(request)

    async def main():
        nonlocal begin
        begin = asyncio.get_running_loop().time()
        pacer = Pacer(limits)
        return await asyncio.gather(*(send(pacer, *item) for item in plan), return_exceptions=True)

    begin = 0.0
    return asyncio.run(main()), starts


def fails(is_transient: bool = True, retry_after: float = 0.0) -> DownloadError:
    return DownloadError("http://a/", "no", is_transient, None, retry_after)


def test_a_busy_host_keeps_no_other_waiting():
    limits = Limits(num_requests=2, num_per_host=1, interval_seconds=0.2)
    _, starts = run(limits, [("a", [1])] * 3 + [("b", [1])])
    times = [seconds for host, seconds in starts if host == "a"]
    assert dict(starts)["b"] < times[1]
    assert times[-1] > 0.35


def test_as_many_are_under_way_as_the_limits_say_and_no_more():
    """Counted on the event loop itself, so that a busy machine changes nothing."""
    now: Counter[str] = Counter()
    most: Counter[str] = Counter()

    async def request(pacer: Pacer, host: str) -> None:
        async with pacer.turn(host):
            now.update([host, "all"])
            most.update({key: now[key] - most[key] for key in (host, "all") if now[key] > most[key]})
            for _ in range(5):
                await asyncio.sleep(0)
            now.subtract([host, "all"])

    async def main() -> None:
        pacer = Pacer(Limits(num_requests=5, num_per_host=3, interval_seconds=0))
        await asyncio.gather(*(request(pacer, host) for host in ["a", "b"] * 12))

    asyncio.run(main())
    assert most == {"a": 3, "b": 3, "all": 5}


def test_attempts_end_with_success_with_their_number_or_with_an_error_that_stays():
    limits = Limits(num_per_host=9, interval_seconds=0, pause_seconds=0.05, max_pause_seconds=1)
    last, final, patient = fails(), fails(is_transient=False), fails(retry_after=2)
    plan = [
        ("a", [fails(), fails(), "done"]),
        ("b", [fails(), fails(), last]),
        ("c", [final]),
        ("d", [patient]),
    ]
    results, starts = run(limits, plan)
    assert results == ["done", last, final, patient]
    a = [seconds for host, seconds in starts if host == "a"]
    assert len(starts) == 3 + 3 + 1 + 1
    assert a[1] - a[0] > 0.05 + 0.045  # the request and the pause
    assert a[2] - a[1] > 0.05 + 0.095


def test_a_host_that_asks_for_rest_has_it_from_all():
    limits = Limits(num_per_host=1, interval_seconds=0, pause_seconds=0)
    _, starts = run(limits, [("a", [fails(retry_after=0.3), 1]), ("a", [2]), ("b", [3])])
    starts.sort(key=lambda start: start[1])
    assert sorted(host for host, _ in starts[:2]) == ["a", "b"]
    assert [host for host, seconds in starts[2:] if seconds > 0.3] == ["a", "a"]


@pytest.mark.parametrize(
    "values",
    [{"num_requests": 0}, {"num_per_host": 0}, {"num_attempts": 0}, {"interval_seconds": -1},
     {"pause_seconds": float("nan")}, {"max_pause_seconds": -0.1}],
)  # fmt: skip
def test_limits_that_cannot_be(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Limits(**values)
