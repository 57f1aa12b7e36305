"""Where a run's progress goes: the terminal, `metrics.jsonl`, TensorBoard, a plot."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxcls.evaluation import plots

with epy.lazy_imports():
    import tensorboardX  # only a run that is written to a folder needs it

Row = Mapping[str, Any]
SPEED = "images_per_second"


class Reporter:
    """Hears of a run as it goes on. Each method does nothing unless a subclass has a use for it."""

    def message(self, text: str) -> None:
        """Something the user should know."""

    def steps(self, num_steps: int, row: Row) -> None:
        """`num_steps` more are done, up to `row["step"]`; the row also has mean `loss`, `error`, and `rate`.

        After a step that ran out of memory, `step` goes back to where training went on.
        """

    def epoch(self, row: Row) -> None:
        """An epoch is done; `row` is its row of the history."""

    def close(self) -> None:
        """The run has ended or failed."""


class Reporters(Reporter):
    """Several reporters as one."""

    def __init__(self, members: Sequence[Reporter]) -> None:
        self._members = tuple(members)

    def message(self, text: str) -> None:
        for member in self._members:
            member.message(text)

    def steps(self, num_steps: int, row: Row) -> None:
        for member in self._members:
            member.steps(num_steps, row)

    def epoch(self, row: Row) -> None:
        for member in self._members:
            member.epoch(row)

    def close(self) -> None:
        for member in self._members:
            member.close()


class ConsoleReporter(Reporter):
    """A live bar on a terminal, and in any case one line per epoch, on standard error.

    Args:
        num_epochs, steps_per_epoch, batch_size: of the run.
        step: the number of steps done before.
    """

    def __init__(self, num_epochs: int, steps_per_epoch: int, batch_size: int, step: int = 0) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._batch_size = batch_size
        self._num_epochs = num_epochs
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        total = num_epochs * steps_per_epoch
        self._task = self._bar.add_task("training", total=total, completed=step, state="")
        self._since = time.perf_counter()

    def message(self, text: str) -> None:
        self._console.print(text, markup=False)

    def steps(self, num_steps: int, row: Row) -> None:
        self._bar.start()
        now = time.perf_counter()
        speed = num_steps * self._batch_size / (now - self._since)
        self._since = now
        state = f"loss {row['loss']:.4f}  error {row['error']:.2%}  {speed:.1f} images/s"
        self._bar.update(self._task, completed=row["step"], state=state)

    def epoch(self, row: Row) -> None:
        self.message(epoch_line(row, self._num_epochs))
        self._since = time.perf_counter()

    def close(self) -> None:
        self._bar.stop()


class MetricsReporter(Reporter):
    """Writes one JSON object per epoch to `metrics.jsonl`: what the configuration determines, so no speed.

    Args:
        run_dir: the folder.
        history: the rows before, written again: the file may hold more, or half a line.
    """

    def __init__(self, run_dir: Path, history: Iterable[Row] = ()) -> None:
        self._file = (run_dir / "metrics.jsonl").open("w", encoding="utf-8")
        for row in history:
            self.epoch(row)

    def epoch(self, row: Row) -> None:
        reproducible = {name: value for name, value in row.items() if name != SPEED}
        self._file.write(json.dumps(reproducible) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardReporter(Reporter):
    """Scalars of steps and epochs as TensorBoard events.

    Args:
        run_dir: the folder.
        step: the number of steps done before; TensorBoard hides what was written of later ones.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        self._writer = tensorboardX.SummaryWriter(str(run_dir), purge_step=step + 1)

    def steps(self, num_steps: int, row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"step/{name}", value, row["step"])

    def epoch(self, row: Row) -> None:
        for name, value in row.items():
            if value is not None:
                self._writer.add_scalar(f"epoch/{name}", value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class PlotReporter(Reporter):
    """Training and evaluation accuracy by epoch, as `accuracy.png`.

    Args:
        run_dir: the folder.
        history: the rows before.
    """

    def __init__(self, run_dir: Path, history: Iterable[Row] = ()) -> None:
        self._path = run_dir / "accuracy.png"
        self._history = list(history)

    def epoch(self, row: Row) -> None:
        self._history.append(row)

    def close(self) -> None:
        if self._history:
            plots.save(plots.plot_training(self._history), self._path)


def epoch_line(row: Row, num_epochs: int) -> str:
    """One epoch as a line of text."""
    text = (
        f"epoch {row['epoch']:>3}/{num_epochs}  rate {row['learning_rate']:g}  loss {row['train_loss']:.4f}  "
        f"error {1 - row['train_accuracy']:.2%}  {row[SPEED]:.1f} images/s"
    )
    if row.get("eval_accuracy") is None:
        return text
    wrong = row["eval_num_seen"] - row["eval_num_correct"]
    return f"{text}  evaluation error {1 - row['eval_accuracy']:.2%} ({wrong} of {row['eval_num_seen']})"
