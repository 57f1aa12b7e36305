"""Load tests of a service whose answers are written down beforehand, in a process of its own."""

import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos

from jaxcls.cli import main
from jaxcls.errors import ServiceError, UsageError
from jaxcls.serving.load_test import Load, Report, choose_images, load_test

SCRIPTED = Path(__file__).with_name("scripted_service.py")
SECONDS = 60
"""How long anything may take."""


@dataclass(frozen=True)
class Scripted:
    """A running service."""

    log: Path

    @property
    def url(self):
        return f"http://127.0.0.1:{json.loads(self.log.read_text().splitlines()[0])['port']}"

    def requests(self):
        """Those of the load; the first is a question whether there is such a service."""
        return [json.loads(line) for line in self.log.read_text().splitlines()[2:]]


@pytest.fixture
def scripted(tmp_path):
    @contextmanager
    def start(*steps):
        log = tmp_path / "service.log"
        with subprocess.Popen([sys.executable, SCRIPTED, log], stdin=subprocess.PIPE) as process:
            process.stdin.write(json.dumps(steps).encode())
            process.stdin.close()
            try:
                wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
                yield Scripted(log)
            finally:
                process.kill()

    return start


def wait_until(condition):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("images"), {"red": 2, "blue": 1})


def command(service, folder, *options):
    return ["loadtest", service.url, "--images", str(folder), *map(str, options)]


def read(out):
    return json.loads((out / "report.json").read_text())


# Loads.


def test_open_loop_keeps_its_rate_and_measures_the_latencies_that_the_service_has(scripted, folder):
    slow, busy, quick = [200, 0.3], [429, 0], [200, 0.02]
    with scripted(slow, busy, busy, *[quick] * 17) as service:
        report = load_test(Load(url=service.url, images=choose_images(folder), rate=200, seconds=1))
        arrived = [request["at"] for request in service.requests()]
    assert len(arrived) == len(report.outcomes) == 200
    assert 199 / (arrived[-1] - arrived[0]) == pytest.approx(200, rel=0.1)
    assert report.counts == {"ok": 180, "429": 20}
    latency = report.latency_ms()  # of 180 answers 10 are slow, which is more than 5 %
    assert 20 < latency["p50"] < latency["p90"] < 150
    assert 300 < latency["p95"] < latency["p99"] <= latency["max"] < 450
    assert report.latency_ms("429")["p90"] < 20
    assert report.goodput == pytest.approx(180, rel=0.1)
    assert not report.problems
    assert not replace(report, p99_ms=450).problems
    assert "above the objective" in replace(report, p99_ms=300).problems[0]


def test_requests_count_from_when_they_should_have_begun(scripted, folder):
    """While the service stands still for half a second, 50 requests arrive, and each has its share of it."""
    with scripted(*[[200, 0]] * 30, [200, 0.5, True], *[[200, 0]] * 69) as service:
        report = load_test(Load(url=service.url, images=choose_images(folder), rate=100, seconds=1))
    waited = np.sort(report.finished - report.intended)[-50:]
    assert waited == pytest.approx(np.linspace(0, 0.5, 50), abs=0.1)


def test_closed_loop_writes_a_report_and_misses_its_objective(scripted, folder, tmp_path, capsys):
    key_file, out = tmp_path / "key", tmp_path / "out"
    key_file.write_text("# for tests\nsesame-open-sesame # the only one\n")
    with scripted([200, 0.05]) as service:
        options = ["--users", 4, "--duration", 1, "--p99-ms", 40, "--key-file", key_file, "--out", out]
        assert main(command(service, folder, *options)) == 1
        requests = service.requests()
    report, printed = read(out), capsys.readouterr().out
    assert 40 < report["goodput"] <= 4 / 0.05 + 4
    assert report["outcomes"]["ok"]["count"] == len(requests)
    assert "p99 is" in printed
    assert report["problems"] == [line for line in printed.splitlines() if line.startswith("p99 is")]
    assert {request["authorization"] for request in requests} == {"Bearer sesame-open-sesame"}
    assert {request["request"] for request in requests} == {"POST /v1/predict HTTP/1.1"}
    sent = Counter(request["sha256"] for request in requests)
    assert sent.keys() == {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*.png")}
    assert max(sent.values()) - min(sent.values()) <= 1
    page = (out / "report.html").read_text()
    assert f"{len(requests):,}<td>100.0%" in page
    assert set(re.findall(r"src=\"(.{15})", page)) == {"data:image/png;"}
    assert "sesame" not in page + printed + (out / "report.json").read_text()
    assert (out / "goodput.png").read_bytes().startswith(b"\x89PNG")


def test_service_that_dies(scripted, folder, tmp_path, capsys):
    with scripted(*[[200, 0]] * 40, [0, 0]) as service:
        options = ["--rate", 100, "--duration", 0.75, "--out", tmp_path / "out"]
        assert main(command(service, folder, *options)) == 1
    outcomes = read(tmp_path / "out")["outcomes"]
    counts = {name: outcome["count"] for name, outcome in outcomes.items()}
    assert set(counts) == {"ok", "Connection refused", "connection closed"}
    assert sum(counts.values()) == 75
    # It dies of one request; of the others that it has by then, some may still be under way.
    assert 30 <= counts["ok"] <= 39
    assert f"{75 - counts['ok']} of 75 requests failed" in capsys.readouterr().out


def test_generator_at_its_limit_is_told_from_the_service(scripted, folder):
    with scripted([200, 0]) as service:
        report = load_test(Load(url=service.url, images=choose_images(folder), rate=50_000, seconds=0.5))
    assert len(report.warnings) >= 1
    assert "of 50000 requests/s: it, not the service, is at its limit" in report.warnings[0]


def start_load_test(service, folder, out, **options):
    arguments = command(service, folder, "--users", 2, "--duration", 600, "--out", out)
    return subprocess.Popen([sys.executable, "-m", "jaxcls.cli", *arguments], **options)


def test_interrupt_ends_early_with_a_report(scripted, folder, tmp_path):
    terminal, other_end = pty.openpty()
    with scripted([200, 0.02]) as service:
        process = start_load_test(service, folder, tmp_path / "out", stderr=other_end, start_new_session=True)
        os.close(other_end)
        shown = ""
        while not re.search(r"1 s: \d+ ok, 0 told to come again, 0 failed", shown):
            shown += os.read(terminal, 1000).decode()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(SECONDS) == 130
        num_requests = len(service.requests())
    os.close(terminal)
    report = read(tmp_path / "out")
    assert report["is_interrupted"]
    assert report["num_requests"] == num_requests
    assert 0.5 < report["seconds"] < SECONDS
    assert not report["problems"]


@pytest.mark.slow
def test_killed_load_test_leaves_no_load_behind(scripted, folder, tmp_path):
    with scripted([200, 0.02]) as service:
        process = start_load_test(service, folder, tmp_path / "out")
        wait_until(lambda: len(service.requests()) > 10)
        process.kill()
        process.wait()

        def is_quiet():
            before = len(service.requests())
            time.sleep(0.5)
            return len(service.requests()) == before

        wait_until(is_quiet)


# Mistakes.


def fails(capsys, code, arguments, *parts):
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("jaxcls: ")
    for part in parts:
        assert part in error


def test_nobody_listens(folder):
    with pytest.raises(ServiceError, match=r"^http://127\.0\.0\.1:1: Connection refused$"):
        load_test(Load(url="http://127.0.0.1:1", images=choose_images(folder), users=1))


def test_key_is_wrong(scripted, folder, capsys):
    with scripted([401, 0]) as service:
        fails(capsys, 1, command(service, folder, "--users", 1), f"{service.url}: 401 {{}}")


def test_an_image_that_the_service_refuses_is_named(scripted, folder, capsys):
    with scripted([400, 0]) as service:
        first = choose_images(folder)[0]
        fails(capsys, 1, command(service, folder, "--users", 1), f"{service.url}: 400 {{}} to {first}")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "for an address, write http://127.0.0.1:8000"),
        *(
            (url, "not an address such as")
            for url in ("ftp://host", "http://", "http://host:port", "http://a:b@c")
        ),
    ],
)
def test_bad_address(url, message, folder, capsys):
    fails(capsys, 2, ["loadtest", url, "--images", str(folder), "--rate", "1"], url, message)


def test_a_deployment_that_there_is_not(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path))
    fails(capsys, 1, ["loadtest", "cups", "--images", str(folder), "--rate", "1"], "no deployment cups")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "1", "--users", "1"], "either a rate"),
        ([], "either a rate"),
        (["--rate", "0"], "rate is 0"),
        (["--users", "-1"], "users is -1"),
        (["--rate", "1", "--duration", "nan"], "seconds is nan"),
    ],
)
def test_bad_load(options, message, folder, capsys):
    fails(capsys, 2, ["loadtest", "http://host", "--images", str(folder), *options], message)


def test_no_images(tmp_path, capsys):
    for folder, message in [(tmp_path, "holds no images"), (tmp_path / "missing", "is no folder")]:
        fails(capsys, 2, ["loadtest", "http://host", "--images", str(folder), "--rate", "1"], message)


def test_report_folder_exists(folder, tmp_path, capsys):
    arguments = ["loadtest", "http://host", "--images", str(folder), "--rate", "1", "--out", str(tmp_path)]
    fails(capsys, 2, arguments, "exists: give a new folder")


def test_locust_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "locust", None)
    arguments = ["loadtest", "http://host", "--images", str(folder), "--rate", "1"]
    fails(capsys, 1, arguments, "locust", "pip install 'jaxcls[loadtest]'")


def test_gevent_stays_out_of_this_process():
    code = "import sys, jaxcls.serving.load_test; print(*{'gevent', 'locust', 'jax'} & set(sys.modules))"
    assert not subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout.strip()


# Reports.


def report_of(*rows, **fields):
    """A report of requests at a rate of 10: outcome, intended, started, finished."""
    outcomes, *times = zip(*rows, strict=True) if rows else ((),) * 4
    intended, started, finished = np.array(times, np.float64)
    load = Load(url="http://host", images=("a.png",), rate=10, seconds=1)
    return replace(
        Report(load=load, began=datetime.now(UTC), outcomes=np.array(outcomes, np.str_), intended=intended,
               started=started, finished=finished, cpu_share=0.1),
        **fields,
    )  # fmt: skip


def test_percentiles_are_latencies_that_occurred():
    report = report_of(*[("ok", 0, ms / 2000, ms / 1000) for ms in range(1, 201)])
    expected = {"p50": 100, "p90": 180, "p95": 190, "p99": 198, "max": 200}
    assert report.latency_ms() == pytest.approx(expected)


def test_goodput_counts_what_was_answered_under_load():
    assert report_of(("ok", 0, 0, 0.5), ("ok", 0.9, 0.9, 1.1), ("429", 0.5, 0.5, 0.6)).goodput == 1


def test_requests_cut_off_by_an_interrupt_are_no_failures():
    rows = [("ok", 0, 0, 0.1), ("unfinished", 0.1, 0.1, 0.2)]
    assert report_of(*rows).problems == ("1 of 2 requests failed",)
    assert not report_of(*rows, is_interrupted=True).problems


def test_refusals_alone_are_no_pass():
    assert report_of(("429", 0, 0, 0.1), ("503", 0, 0, 0.1)).problems == ("no request was answered well",)


def test_late_generator_is_named():
    report = report_of(*[("ok", n / 10, n / 10 + 0.05, n / 10 + 0.1) for n in range(10)])
    assert "50 ms late" in report.warnings[0]


def test_timeline_counts_every_request_once():
    rows = [("ok", 0, 0, 0.1), ("ok", 0, 0, 0.95), ("429", 0, 0, 0.95), ("timed out", 0, 0, 30.2)]
    edges, rates = report_of(*rows).timeline()
    counts = {kind: rate * np.diff(edges) for kind, rate in rates.items()}
    assert {kind: count.sum() for kind, count in counts.items()} == pytest.approx(
        {"ok": 2, "busy": 1, "failed": 1}
    )
    assert counts["failed"][-1] == pytest.approx(1)


def test_most_requests_under_way_at_a_time():
    assert report_of(("ok", 0, 0, 3), ("ok", 1, 1, 2), ("ok", 2.5, 2.5, 4)).max_in_flight == 2


def test_empty_report_can_be_written(tmp_path):
    report = report_of(is_interrupted=True)
    report.write(tmp_path / "out")
    assert read(tmp_path / "out")["num_requests"] == 0
    assert "0 good answers/s" in str(report)


def test_page_holds_no_markup_of_others(tmp_path):
    report_of(("<script>", 0, 0, 1)).write(tmp_path / "out")
    assert "<td>&lt;script&gt;<td>" in (tmp_path / "out" / "report.html").read_text()


def test_images_beyond_the_memory_of_the_generator_are_left_out(folder, monkeypatch):
    largest = max(path.stat().st_size for path in folder.rglob("*.png"))
    monkeypatch.setattr("jaxcls.serving.load_test.MAX_IMAGE_BYTES", 2 * largest)
    assert len(choose_images(folder)) == 2
    monkeypatch.setattr("jaxcls.serving.load_test.MAX_IMAGE_BYTES", 1)
    assert len(choose_images(folder)) == 1


def test_key_is_not_shown():
    assert "sesame" not in repr(Load(url="http://host", images=(), rate=1, key="sesame"))
    with pytest.raises(UsageError):
        Load(url="http://host", images=(), rate=1, users=1, key="sesame")
