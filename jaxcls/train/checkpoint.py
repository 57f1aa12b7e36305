"""Checkpoints: what a run needs to go on as if it had never stopped, each in a folder named by its step.

    checkpoints/00000042/
        arrays/         the `TrainState`, written by Orbax
        progress.json   the rest of the `Snapshot`, and which run it belongs to
        sha256sums      of all these files; `sha256sum -c sha256sums` checks them too

The checksums detect corruption, not an attacker: Orbax alone restores flipped bits
silently. A folder is complete under its final name; until then it ends in `.partial`.
There is no iterator state: the position in the data is the step.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax.traverse_util import flatten_dict

from jaxcls.errors import TrainingError, UsageError
from jaxcls.parallel import from_first_process, gather
from jaxcls.storage import file_sha256
from jaxcls.train.state import Totals, TrainState, to_host

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

ARRAYS, PROGRESS, CHECKSUMS = "arrays", "progress.json", "sha256sums"
FORMAT, FORMAT_VERSION = "jaxcls-checkpoint", 1
PARTIAL = ".partial"
OLD = f".old{PARTIAL}"


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps, on the host.

    Attributes:
        state: of NumPy arrays, see `to_host`.
        totals: of the unfinished epoch's steps.
        history: a row for each finished epoch.
        num_parts: that batches are done in, see `make_train_step`.
    """

    state: TrainState
    totals: Totals
    history: tuple[dict[str, Any], ...]
    num_parts: int = 1

    @property
    def step(self) -> int:
        """The number of steps done."""
        return int(self.state.step)

    @property
    def position(self) -> tuple[int, int]:
        """The steps and the epochs done: after an epoch's last step, its evaluation is still to come."""
        return self.step, len(self.history)

    @property
    def best_step(self) -> int | None:
        """The step of the first epoch with the best evaluation accuracy, if there was any evaluation."""
        rows = [row for row in self.history if "eval_accuracy" in row]
        return max(rows, key=lambda row: row["eval_accuracy"])["step"] if rows else None


class Checkpoints:
    """The checkpoints of one run, written by one thread while training goes on.

    `newest` is the position of the newest that is written or was restored, or None.

    Args:
        folder: `checkpoints` of the run.
        identity: what a run must have in common with a checkpoint to go on from it; nested, of JSON values.
        environment: on what else the bits of the results depend, as text; another is only remarked upon.
        num_kept: how many of the newest to keep; the one with the best evaluation accuracy stays besides.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], environment: str, *, num_kept: int) -> None:
        self.folder = folder
        self.newest: tuple[int, int] | None = None
        self._identity = json.loads(json.dumps(identity))
        self._environment = environment
        self._num_kept = num_kept
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._since = time.monotonic()

    def has_room_for(self, snapshot: Snapshot) -> bool:
        """Whether to save a finished epoch: while another is being written, only the best waits for it."""
        return not self.is_writing or snapshot.best_step == snapshot.step

    @property
    def is_writing(self) -> bool:
        """Whether the last `save` is still under way."""
        return self._writing is not None and not self._writing.done()

    def is_due(self, seconds: float) -> bool:
        """Whether the last `save` is done and began so long ago; before the first, this object did."""
        return time.monotonic() - self._since >= seconds and not self.is_writing

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write; first wait for the one before.

        Raises:
            TrainingError: the one before could not be written.
        """
        self.wait()
        self._since = time.monotonic()
        self._writing = self._writer.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait until the last `save` is done.

        Raises:
            TrainingError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def finish(self, snapshot: Snapshot | None) -> None:
        """Wait; then write a snapshot, unless it or a later one is written.

        Raises:
            TrainingError: one of them could not be written.
        """
        self.wait()
        if snapshot is not None and snapshot.position > (self.newest or (0, 0)):
            self.save(snapshot)
            self.wait()

    def restore(self, like: TrainState) -> tuple[Snapshot | None, list[str]]:
        """The newest good checkpoint, if there is any checkpoint, and what to tell about the others.

        Args:
            like: a state of the same shapes and dtypes.

        Raises:
            TrainingError: there are checkpoints, but no good one, or one of another format.
            UsageError: they belong to another run.
        """
        notes: list[str] = []
        for old in self.folder.glob(f"*{OLD}"):
            path = old.with_name(old.name.removesuffix(OLD))
            if not path.exists():  # killed before the new one was in its place
                old.rename(path)
        useless = list(self.folder.glob(f"*{PARTIAL}"))
        for path in reversed(_complete(self.folder)):
            if problem := find_damage(path):
                notes.append(f"Checkpoint {path} is damaged and passed over: {problem}")
                useless.append(path)
                continue
            snapshot, environment = self._read(path, like)
            if environment != self._environment:
                notes.append(
                    f"Written on {environment}, resumed on {self._environment}: the results can differ in "
                    "their last digits from those of an undisturbed run"
                )
            # They will be written again. Left alone, they would count as the newest.
            _discard(useless)
            self.newest = snapshot.position
            return snapshot, notes
        if notes:
            raise TrainingError("\n".join([f"{self.folder} holds no good checkpoint", *notes]))
        _discard(useless)
        return None, notes

    def _read(self, path: Path, like: TrainState) -> tuple[Snapshot, str]:
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        if (progress["format"], progress["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise TrainingError(
                f"{path} has format {progress['format_version']}, this jaxcls reads {FORMAT_VERSION}: "
                "use the jaxcls that wrote it"
            )
        if differences := _differences(progress["identity"], self._identity):
            raise UsageError(
                f"{path} belongs to another run: {'; '.join(differences)}. "
                "Repeat what the run was started with, or give a new folder"
            )
        with _orbax() as orbax:
            state = TrainState(**orbax.restore(path.absolute() / ARRAYS, vars(to_host(like))))
        totals, history = Totals(**progress["totals"]), tuple(progress["history"])
        snapshot = Snapshot(state, totals, history, progress["num_parts"])
        return snapshot, progress["environment"]

    def _write(self, snapshot: Snapshot) -> None:
        path = self.folder / f"{snapshot.step:08d}"
        partial = path.with_suffix(PARTIAL)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _require_room(partial, snapshot)
            with _orbax() as orbax:
                orbax.save(partial.absolute() / ARRAYS, vars(snapshot.state))
            progress = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "identity": self._identity,
                "environment": self._environment,
                "totals": asdict(snapshot.totals),
                "history": snapshot.history,
                "num_parts": snapshot.num_parts,
            }
            (partial / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
            _flush(*partial.rglob("*"))
            (partial / CHECKSUMS).write_text(list_checksums(partial), encoding="utf-8")
            _flush(partial / CHECKSUMS, partial)
            _put_in_place(partial, path)
        # Of any kind: a full disk is an OSError for Python, a ValueError for TensorStore.
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(
                f"the checkpoint of step {snapshot.step} could not be written to {self.folder}: {error}: "
                "those before it are whole; once this is mended, resume the run"
            ) from error
        self.newest = snapshot.position
        self._prune(snapshot.best_step)

    def _prune(self, best_step: int | None) -> None:
        for path in _complete(self.folder)[: -self._num_kept]:
            if int(path.name) != best_step:
                _remove(path)


def _discard(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _orbax() -> "ocp.Checkpointer":
    """For this process alone: it would wait for all the others, which do not save. Paths must be absolute."""
    # Imported in the writing thread: half a second for which training need not wait.
    import orbax.checkpoint as ocp

    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def snapshot_of_first_process(snapshot: Snapshot | None, like: TrainState) -> Snapshot | None:
    """The first process's snapshot, on all of them; `like` is a state of the same shapes and dtypes."""
    progress = gather(
        None if snapshot is None else [asdict(snapshot.totals), snapshot.history, snapshot.num_parts]
    )[0]
    if progress is None:
        return None
    totals, history, num_parts = progress
    state = from_first_process(to_host(like) if snapshot is None else snapshot.state)
    return Snapshot(state, Totals(**totals), tuple(history), num_parts)


def list_checksums(folder: Path) -> str:
    """The text of `sha256sum` for all files below a folder but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    return "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: files changed, missing or added since its checksums were taken."""
    try:
        expected, found = (
            (folder / CHECKSUMS).read_bytes(),
            list_checksums(folder).encode(errors="surrogateescape"),
        )
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if expected == found:
        return None
    lines = set(expected.decode(errors="replace").splitlines()) ^ set(
        found.decode(errors="replace").splitlines()
    )
    names = sorted({line.partition("  ")[2] for line in lines}) or [CHECKSUMS]
    return f"{', '.join(names)} and {CHECKSUMS} do not fit together"


def _require_room(folder: Path, snapshot: Snapshot) -> None:
    # Before Orbax finds out: its threads each print a traceback.
    if shutil.disk_usage(folder).free < sum(leaf.nbytes for leaf in jax.tree.leaves(snapshot.state)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _put_in_place(new: Path, path: Path) -> None:
    old = path.with_suffix(OLD)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():  # written before the evaluation of its epoch
        path.rename(old)
    new.rename(path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    """Not file by file under its own name: stopped half-way, that would leave a damaged checkpoint."""
    partial = path.with_suffix(PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(path.rename(partial), ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """The folders named by a step, oldest first."""
    return sorted(
        (path for path in folder.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name)
    )


def _flush(*paths: Path) -> None:
    """Make sure that files and the entries of folders are on the disk, and not in its cache alone."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested dictionaries, as text."""
    old, new = (flatten_dict(values, keep_empty_nodes=True, sep=".") for values in (before, now))
    return [
        f"{name} was {old.get(name)}, is {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
