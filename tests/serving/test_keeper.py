"""What keeps a replica running, with small processes in its place."""

import asyncio
import logging
import sys
import time
from pathlib import Path

import pytest

from jaxcls.errors import DeploymentError
from jaxcls.serving import keeper as keeper_module
from jaxcls.serving.keeper import Keeper

READY = "import os, sys, time, signal; os.write(int(sys.argv[2]), b'ready\\n'); "


def keep(code, check, executable=sys.executable):
    """Run `check` on a keeper of processes that run `code`, with the fds of its socket and its pipe."""

    async def run():
        def command(admin, status):
            return [executable, "-c", code, str(admin), str(status)]

        changes = []
        keeper = Keeper(7, 1, command, (), lambda: changes.append(None))
        try:
            await asyncio.wait_for(check(keeper), 30)
        finally:
            await keeper.end()
        assert keeper.report.pid is None

    asyncio.run(run())


def num_open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_ready_and_ended_in_peace(caplog):
    async def check(keeper):
        await keeper.became_ready
        assert (keeper.report.state, keeper.report.name) == ("ready", "7-1")

    caplog.set_level(logging.INFO)
    handle = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('bye'))); "
    keep(handle + READY + "time.sleep(60)", check)
    assert "bye" in caplog.messages


def test_one_that_dies_is_started_again():
    async def check(keeper):
        await until(lambda: keeper.report.num_restarts == 3)

    keep(READY + "sys.exit(1)", check)


def test_one_that_cannot_be_started_is_tried_again(monkeypatch, caplog):
    monkeypatch.setattr(keeper_module, "FIRST_PAUSE_SECONDS", 0.01)

    async def check(keeper):
        await until(lambda: keeper.report.num_restarts == 3)

    before = num_open_files()
    keep("", check, "/nowhere/python")
    assert "No such file" in caplog.text
    assert num_open_files() == before


def test_ended_while_it_starts_it_leaves_nothing():
    async def check(keeper):
        await asyncio.sleep(0)

    before = num_open_files()
    keep("import time; time.sleep(60)", check)
    assert num_open_files() == before


def test_pauses_double_while_it_does_not_become_ready(monkeypatch, caplog):
    monkeypatch.setattr(keeper_module, "FIRST_PAUSE_SECONDS", 0.01)

    async def check(keeper):
        await until(lambda: keeper.report.num_restarts == 3)
        with pytest.raises(DeploymentError, match=r"7-1 ended with exit code 1 before .*: no weights"):
            await keeper.became_ready

    keep("import sys; print('no weights'); sys.exit(1)", check)
    pauses = [record.args[0] for record in caplog.records if "is started again" in record.msg]
    assert pauses[:3] == [0.02, 0.04, 0.08]


def test_wrong_usage_is_final():
    async def check(keeper):
        await until(lambda: keeper.report.state == "failed")
        assert keeper.report.num_restarts == 0
        assert keeper.became_ready.exception()

    keep("import sys; sys.exit(2)", check)


def test_one_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(keeper_module, "DRAIN_SECONDS", 0.2)

    async def check(keeper):
        await until(lambda: keeper.report.state == "ready")
        started = time.monotonic()
        await keeper.end()
        assert 0.2 <= time.monotonic() - started < 10

    keep("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + READY + "time.sleep(60)", check)


def test_it_is_ended_while_it_waits():
    async def check(keeper):
        await until(lambda: keeper.report.state == "waiting")

    keep("import sys; sys.exit(1)", check)


def test_long_lines_are_logged_in_parts(caplog):
    async def check(keeper):
        await until(lambda: keeper.report.state == "waiting")

    caplog.set_level(logging.INFO)
    keep("print('x' * 1_000_000); print('\\xff'); 1 / 0", check)
    lines = [record.args[0] for record in caplog.records if record.msg == "%s"]
    assert sum(line.count("x") for line in lines) >= 1_000_000
    assert lines[-1] == "ZeroDivisionError: division by zero"
