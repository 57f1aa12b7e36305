"""Reporters: what the terminal and the run folder show."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from jaxcls.train.reporters import MetricsReporter, PlotReporter, Reporter, Reporters, epoch_line

ROW = {
    "epoch": 2,
    "step": 6,
    "learning_rate": 0.005,
    "train_loss": 0.25,
    "train_accuracy": 0.9,
    "images_per_second": 60.04,
}
EVALUATED = ROW | {"eval_loss": 0.5, "eval_accuracy": 21 / 22, "eval_num_correct": 21, "eval_num_seen": 22}
CONSOLE_RUN = f"""
from jaxcls.train.reporters import ConsoleReporter
reporter = ConsoleReporter(num_epochs=2, steps_per_epoch=3, batch_size=4)
reporter.message("[red] and [/] are a folder's name")
reporter.steps(3, {{"step": 3, "loss": 0.5, "error": 0.25, "rate": 0.005}})
reporter.epoch({EVALUATED})
reporter.close()
reporter.close()
"""


def test_the_line_of_an_epoch():
    text = "epoch   2/15  rate 0.005  loss 0.2500  error 10.00%  60.0 images/s"
    assert epoch_line(ROW, 15) == text
    assert epoch_line(EVALUATED, 15) == f"{text}  evaluation error 4.55% (1 of 22)"


def test_without_a_terminal_the_console_gets_plain_lines():
    run = subprocess.run([sys.executable, "-c", CONSOLE_RUN], capture_output=True, text=True, check=True)
    assert run.stdout == ""
    assert run.stderr == f"[red] and [/] are a folder's name\n{epoch_line(EVALUATED, 2)}\n"


def test_on_a_terminal_the_console_shows_a_bar_that_goes_away():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    run = subprocess.Popen([sys.executable, "-c", CONSOLE_RUN], stderr=theirs, env=environment)
    os.close(theirs)
    text = b""
    with suppress(OSError):  # Linux's word for the end of a terminal
        while piece := os.read(ours, 4096):
            text += piece
    os.close(ours)
    assert run.wait(timeout=60) == 0
    shown = text.decode()
    assert "3/6" in shown
    assert "loss 0.5000  error 25.00%" in shown
    assert epoch_line(EVALUATED, 2) in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, and shown again


def test_every_reporter_hears_everything():
    class Log(Reporter):
        def __init__(self):
            self.heard = []

        def message(self, text):
            self.heard.append(text)

        def steps(self, num_steps, row):
            self.heard.append((num_steps, row))

        def epoch(self, row):
            self.heard.append(row)

        def close(self):
            self.heard.append("closed")

    members = [Log(), Reporter(), Log()]
    everyone = Reporters(members)
    everyone.message("hello")
    everyone.steps(3, {"loss": 1.0})
    everyone.epoch(ROW)
    everyone.close()
    assert members[0].heard == members[2].heard == ["hello", (3, {"loss": 1.0}), ROW, "closed"]


def test_metrics_are_on_disk_after_each_epoch(tmp_path):
    reporter = MetricsReporter(tmp_path)
    for number, row in enumerate((ROW, EVALUATED), start=1):
        reporter.epoch(row)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == number
        assert json.loads(lines[-1]) | {"images_per_second": 60.04} == row
    reporter.close()


def test_metrics_of_a_resumed_run_start_from_its_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    reporter = MetricsReporter(tmp_path, [ROW])
    reporter.epoch(EVALUATED)
    reporter.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [ROW["epoch"], EVALUATED["epoch"]]


@pytest.mark.parametrize("num_epochs", [0, 1])
def test_the_plot_needs_an_epoch(tmp_path, num_epochs):
    reporter = PlotReporter(tmp_path)
    for _ in range(num_epochs):
        reporter.epoch(ROW)
    reporter.close()
    assert (tmp_path / "accuracy.png").exists() == bool(num_epochs)
