"""The command line: each subcommand is one call into the API, its flags a dataclass."""

# Annotations stay text: evaluated, those of the API would load JAX before `--help` is printed.
from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TextIO

import numpy as np
import tyro
from tyro.conf import OmitArgPrefixes, Positional

import jaxcls
from jaxcls.data.duplicates import describe_leakage, find_duplicates, find_leakage
from jaxcls.data.images import MAX_PIXELS
from jaxcls.errors import JaxclsError, UsageError
from jaxcls.models.precision import PLATFORMS, Platform, Precision
from jaxcls.serving.config import READY_SECONDS, ServiceConfig, require_extra
from jaxcls.storage import Storage
from jaxcls.train.config import FinetuneConfig

if TYPE_CHECKING:
    from jaxcls.evaluation.label_errors import LabelErrors
    from jaxcls.serving.client import Client

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
KEY_VARIABLE = "JAXCLS_SERVICE_KEY"


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every subcommand takes."""

    uses_jax: ClassVar[bool] = True

    debug: bool = False
    """Show the traceback of an error."""

    def run(self) -> int:
        """Do it and return the exit code."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PhotoCommand(Command):
    """What every subcommand that reads photos takes."""

    max_pixels: int = MAX_PIXELS
    """Refuse photos of more pixels, before decoding them."""

    def read(
        self, path: Path, classes: Sequence[str] | None = None, *, skip_bad: bool = False
    ) -> jaxcls.Dataset:
        """The photos of a folder, without undecodable ones if these are to be skipped."""
        photos = jaxcls.read_folder(path, classes=classes, max_pixels=self.max_pixels)
        if not skip_bad:
            return photos
        good = jaxcls.scan(photos, max_bad_fraction=1.0)
        for note in good.notes[len(photos.notes) :]:
            print(note, file=sys.stderr)
        return good


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which network to start from."""

    backbone: str = "resnet18"
    """A name of the catalogue (`jaxcls info` lists them), or the path of a saved classifier."""
    weights: Path | None = None
    """Weights from this file (.safetensors, .pth) instead of the hub."""
    image_size: int | None = None
    """Pixels; default: the size the weights were trained for."""

    def load(self) -> jaxcls.Backbone:
        """The backbone these options name."""
        if _is_classifier(Path(self.backbone)):
            if self.weights is not None:
                raise UsageError("--weights does not go with --backbone CLASSIFIER, which has its own")
            backbone = jaxcls.load(self.backbone).backbone
            return backbone if self.image_size is None else backbone.with_image_size(self.image_size)
        return jaxcls.load_pretrained(self.backbone, weights=self.weights, image_size=self.image_size)


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which photos are held out for testing."""

    test_data: Path | None = None
    """A folder of test photos. Without it, a stratified part of the photos is held out."""
    train_size: float = 0.66
    """Share of the photos to train on; 1: all of them, without a test; above 1: their number."""
    split_seed: int = 0
    """Another seed, another held-out part."""
    group_duplicates: bool = True
    """Look for photos that show the same, and hold out all or none of them."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the rows of scored images go."""

    format: Literal["table", "csv", "jsonl"] | None = None
    """How to write the rows; default: by the suffix of --out, else a table."""
    out: Path | None = None
    """Write to this .csv or .jsonl file instead of the terminal."""

    def __post_init__(self) -> None:
        if self.out is not None and self.form not in ("csv", "jsonl"):
            raise UsageError("--out needs a name that ends in .csv or .jsonl, or --format csv or jsonl")

    @property
    def form(self) -> str:
        """The format, the default resolved."""
        return self.format or ("table" if self.out is None else self.out.suffix.removeprefix("."))

    def write(self, predictions: jaxcls.Predictions) -> int:
        """Write the rows and return the exit code."""
        if self.form == "table":
            _print_table(predictions)
        else:
            write = {"csv": predictions.write_csv, "jsonl": predictions.write_jsonl}[self.form]
            with _open(self.out) as file:
                write(file)
        return FAILED if predictions.errors else DONE


@dataclass(frozen=True, kw_only=True)
class TrainingCommand(PhotoCommand):
    """What both ways of training take."""

    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)
    split: OmitArgPrefixes[SplitOptions] = field(default_factory=SplitOptions)
    skip_bad: bool = False
    """Leave undecodable photos out, however many."""

    def divide(self) -> tuple[jaxcls.Dataset, jaxcls.Dataset | None]:
        """Training and test set."""
        photos = self.read(self.data, skip_bad=self.skip_bad)
        duplicates = find_duplicates(photos) if self.split.group_duplicates else None
        if duplicates is not None:
            photos = replace(photos, groups=duplicates.groups)
            if duplicates.num_exact or duplicates.num_near:
                _note(duplicates.summary().partition("\n")[0])
        if self.split.test_data is not None:
            return photos, self.read(self.split.test_data, photos.classes, skip_bad=self.skip_bad)
        size = self.split.train_size
        if size == 1:
            return photos, None
        train, test = photos.split(int(size) if size > 1 else size, seed=self.split.split_seed)
        if duplicates is None:
            return train, test
        # There are some only where photos form a chain, each like the next, and no group holds all of it.
        twins = duplicates.twins(np.isin(photos.ids, test.ids))
        if twins:
            names = {photos.ids[photo]: photos.ids[twin] for photo, twin in twins.items()}
            print(describe_leakage(names, len(test)), file=sys.stderr)
        return train, test


@dataclass(frozen=True, kw_only=True)
class Quickstart(Command):
    """Train, evaluate, save and score on scikit-learn's handwritten digits: no network, under two minutes."""

    out: Path | None = None
    """A new folder for everything it writes."""

    def run(self) -> int:
        from jaxcls.quickstart import quickstart

        quickstart(self.out or _new_output("quickstart"))
        return DONE


@dataclass(frozen=True, kw_only=True)
class Info(PhotoCommand):
    """Describe a folder of photos or a saved classifier; without a path, this installation."""

    path: Positional[Path | None] = None
    """A folder of photos, or a saved classifier."""
    duplicates: bool = False
    """List the photos that show the same."""
    test_data: Path | None = None
    """A folder of test photos: list those that show the same as a photo of the first folder."""
    label_errors: bool = False
    """Rank the photos whose label is probably wrong, by the features of --backbone."""
    start: OmitArgPrefixes[BackboneOptions] = field(default_factory=BackboneOptions)

    def run(self) -> int:
        asked = self.duplicates or self.label_errors or self.test_data is not None
        if asked and (self.path is None or _is_classifier(self.path)):
            raise UsageError("--duplicates, --test-data and --label-errors go with a folder of photos")
        if self.path is None:
            print(_describe_installation())
        elif _is_classifier(self.path):
            print(_describe_classifier(self.path))
        else:
            dataset = self.read(self.path)
            print(dataset.summary())
            jaxcls.scan(dataset)
            print("every image can be decoded")
            if self.duplicates or self.label_errors:
                duplicates = find_duplicates(dataset)
                dataset = replace(dataset, groups=duplicates.groups)
                if self.duplicates:
                    print(duplicates.summary())
            if self.test_data is not None:
                test = self.read(self.test_data, dataset.classes)
                print(describe_leakage(find_leakage(dataset, test), len(test)))
            if self.label_errors:
                print(self.check_labels(dataset))
        return DONE

    def check_labels(self, dataset: jaxcls.Dataset) -> LabelErrors:
        """The photos whose label is probably wrong."""
        from jaxcls.svm.labels import check_labels

        return check_labels(dataset, self.start.load(), cache=_feature_cache(), progress=True, report=_note)


@dataclass(frozen=True, kw_only=True)
class Train(TrainingCommand):
    """Fine-tune a network on a folder of photos, one sub-folder per class."""

    config: OmitArgPrefixes[FinetuneConfig] = field(default_factory=FinetuneConfig)
    out: Path | None = None
    """A new folder for the run."""
    resume: bool = False
    """Go on with the run in --out where it stopped; start it if there is none yet."""
    distributed: bool = False
    """Train together with the other processes that were started with this command, by srun, mpirun or
    Kubernetes; see "Several machines" in the README."""

    def run(self) -> int:
        from jaxcls.parallel import is_first_process, processes
        from jaxcls.train.folder import CLASSIFIER_FOLDER

        if self.resume and self.out is None:
            raise UsageError("--resume needs --out RUN, the folder of the run to go on with")
        with processes() if self.distributed else nullcontext():
            train, test = self.divide()
            run_dir = self.out or _new_output("train")
            result = jaxcls.finetune(
                train, self.start.load(), self.config, eval_dataset=test, run_dir=run_dir, resume=self.resume
            )
            if not is_first_process():
                return DONE
            print(f"classifier: {run_dir / CLASSIFIER_FOLDER}")
            return DONE if test is None else _report(result.classifier, test, run_dir)


@dataclass(frozen=True, kw_only=True)
class Svm(TrainingCommand):
    """Train a linear SVM on a frozen network's features of a folder of photos."""

    C: float | Literal["cv"] = 1.0
    """Inverse regularisation: small values regularise more. cv: the best in cross-validation."""
    class_weight: Literal["balanced", "none"] = "balanced"
    """Weigh classes inversely to their number of photos, or alike."""
    normalize_features: bool = False
    """Divide each feature vector by its L2 norm."""
    standardize: bool = False
    """Train on features of mean 0 and standard deviation 1."""
    calibrate: Literal["temperature", "sigmoid"] | None = None
    """Make the scores probabilities, by cross-validation: one temperature, or a sigmoid for each class."""
    min_precision: float | None = None
    """Abstain where, in cross-validation, a class's answers at such scores were right less often."""
    num_folds: int = 5
    """Of the cross-validation."""
    precision: Precision = "auto"
    """Of the convolutions."""
    out: Path | None = None
    """Where to save the classifier."""

    def run(self) -> int:
        if self.out is not None and self.out.exists() and not _is_classifier(self.out):
            raise UsageError(f"{self.out} exists and is no saved classifier: choose another path")
        train, test = self.divide()
        if test is not None and test.groups is None and (twins := find_leakage(train, test)):
            _note(describe_leakage(twins, len(test)))
        classifier = jaxcls.fit_svm(
            train,
            self.start.load(),
            C=self.C,
            class_weight=None if self.class_weight == "none" else self.class_weight,
            normalize_features=self.normalize_features,
            standardize=self.standardize,
            calibrate=self.calibrate,
            min_precision=self.min_precision,
            num_folds=self.num_folds,
            cache=_feature_cache(),
            precision=self.precision,
            progress=True,
            report=_note,
        )
        path = classifier.save(self.out or _new_output("svm") / "svm.jaxcls")
        print(f"classifier: {path}")
        return DONE if test is None else _report(classifier, test)


@dataclass(frozen=True, kw_only=True)
class Evaluate(PhotoCommand):
    """Measure a saved classifier on a folder of labelled photos."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    data: Annotated[Positional[Path], tyro.conf.arg(metavar="PHOTOS")]
    """The folder of photos, one sub-folder per class."""
    ids: Path | None = None
    """Only the photos whose ids this file lists, one a line, such as a run's `test_ids.txt`."""
    out: Path | None = None
    """A new folder for predictions.csv and confusion.png."""

    def run(self) -> int:
        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out} exists: give a new folder")
        classifier = jaxcls.load(self.model)
        dataset = self.read(self.data, classifier.classes)
        if self.ids is not None:
            dataset = dataset.select_ids(_read_lines(self.ids))
        return _report(classifier, dataset, self.out)


@dataclass(frozen=True, kw_only=True)
class Predict(PhotoCommand):
    """Score images: a row for each. An unreadable image gets a row with its error, and exit code 1."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    paths: Positional[tuple[Path, ...]]
    """Images, and folders of images."""
    output: OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)
    precision: Precision = "auto"
    """Of the convolutions."""

    def run(self) -> int:
        from jaxcls.data.dataset import from_items

        photos = replace(from_items(_expand(self.paths)), max_pixels=self.max_pixels)
        predictions = jaxcls.predict(jaxcls.load(self.model), photos, precision=self.precision, progress=True)
        return self.output.write(predictions)


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a classifier's scoring programs for cpu and cuda, or a folder for Hugging Face transformers.

    A program, CLASSIFIER/program/PLATFORM.bin, is run by `jaxcls.load_program`, which does not trace the
    network again. It holds no weights and takes any batch size.
    """

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    platforms: tuple[Platform, ...] | None = None
    """What to write programs for; default: cpu and cuda, or none with --hub-folder."""
    precision: Precision = "auto"
    """Of the programs' convolutions; auto: float32 for cpu, bfloat16 for cuda."""
    hub_folder: Path | None = None
    """Write this new folder: weights, configuration and preprocessing for transformers' from_pretrained."""

    def run(self) -> int:
        classifier = jaxcls.load(self.model)
        if self.hub_folder is not None:
            print(f"for transformers: {classifier.export_hub(self.hub_folder)}")
            for note in classifier.hub_notes:
                print(f"note: {note}", file=sys.stderr)
        platforms = self.platforms or (PLATFORMS if self.hub_folder is None else ())
        if platforms:
            for path in classifier.export(self.model, platforms, precision=self.precision):
                print(f"program: {path}")
        return DONE


@dataclass(frozen=True, kw_only=True)
class Serve(Command):
    """Serve a classifier over HTTP until Ctrl-C or SIGTERM. `jaxcls deploy` keeps one running."""

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    config: OmitArgPrefixes[ServiceConfig] = field(default_factory=ServiceConfig)
    host: str = "127.0.0.1"
    """The address to listen on; another than this machine's own needs --key-file."""
    port: int = 8000
    """0: any free one."""
    key_file: Path | None = None
    """Keys, one a line, any of which a request must carry; of mode 0600. Read again on SIGHUP."""
    name: str | None = None
    """Of the model, in addresses; default: that of its folder."""

    def run(self) -> int:
        require_extra()
        from jaxcls.serving.app import Identity
        from jaxcls.serving.auth import Keys
        from jaxcls.serving.replica import listen, serve

        keys = None if self.key_file is None else Keys.read(self.key_file)
        listener = listen(self.host, self.port, is_private=keys is None)
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        name = self.name or self.model.resolve().stem
        serve(
            self.model, [listener], self.config, Identity(name, "1", keys),
            on_ready=lambda: print(f"serving {name}: {address}", flush=True),
        )  # fmt: skip
        return DONE


@dataclass(frozen=True, kw_only=True)
class Score(Command):
    """Have a service score images: a row for each. One that fails gets a row with its error, and exit code 1.

    The service's key comes from --key-file or the environment variable JAXCLS_SERVICE_KEY.
    """

    uses_jax = False

    service: Annotated[Positional[str], tyro.conf.arg(metavar="NAME|URL")]
    """Of `jaxcls deploy`, or the service's address, such as http://127.0.0.1:8000."""
    images: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE ...")]
    """Images, folders of images, and http(s) URLs of images."""
    key_file: Path | None = None
    """A file whose first line, # comments aside, is the key."""
    softmax: bool = False
    """Probabilities in place of the scores as they are."""
    image_resize_dims: Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="W H")] = None
    """Have the images resized to this width and height first."""
    output: OmitArgPrefixes[OutputOptions] = field(default_factory=OutputOptions)

    def run(self) -> int:
        from jaxcls.serving.client import is_url

        images: list[str | Path] = []
        for image in self.images:
            images += [image] if is_url(image) else _expand([Path(image)])
        with _open_service(self.service, self.key_file) as service:
            predictions = service.predict(
                images,
                softmax=self.softmax,
                image_resize_dims=self.image_resize_dims,
                progress=True,
            )
        return self.output.write(predictions)


@dataclass(frozen=True, kw_only=True)
class Deploy(Command):
    """Serve a classifier on this machine under a name, in place of what is served under it: no request fails.

    The service outlives the terminal and keeps a copy of the classifier. Replicas that die are started again.
    Without any bound for them, such as --max-queue, those that it was deployed with last stay.
    """

    uses_jax = False

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """Lower-case letters, digits and hyphens."""
    model: Annotated[Positional[Path | None], tyro.conf.arg(metavar="[CLASSIFIER]")] = None
    """A saved classifier; default: the one that was deployed last under this name."""
    replicas: int | None = None
    """Processes that score, each with the whole classifier; default: as many as there are, or 1."""
    port: int | None = None
    """On 127.0.0.1; default: the one that the deployment has, or a free one."""
    timeout_seconds: float = READY_SECONDS
    """Give up, and keep what is served, if the new replicas are not all ready by then."""
    config: OmitArgPrefixes[ServiceConfig] = field(default_factory=ServiceConfig)

    def run(self) -> int:
        from jaxcls.serving.deployment import Deployment

        config = None if self.config == ServiceConfig() else self.config
        deployment = Deployment(self.name, self.model, self.replicas, config=config)
        deployment.deploy(port=self.port, timeout_seconds=self.timeout_seconds)
        return DONE


@dataclass(frozen=True, kw_only=True)
class List(Command):
    """List the deployments, running or stopped."""

    uses_jax = False

    def run(self) -> int:
        from jaxcls.serving.deployment import list_deployments

        rows = [("name", "state", "version", "ready", "restarts", "endpoint", "status")]
        for found in list_deployments():
            ready = f"{found.num_ready}/{len(found.replicas)}"
            restarts = sum(replica.num_restarts for replica in found.replicas)
            served = str(found.version or "-")
            urls = (found.service_url, found.status_url)
            rows.append((found.name, found.state, served, ready, str(restarts), *urls))
        _print_columns(rows)
        return DONE


@dataclass(frozen=True, kw_only=True)
class Delete(Command):
    """End a deployment once it has answered what it was asked, and remove its key, log and copies."""

    uses_jax = False

    name: Annotated[Positional[str], tyro.conf.arg(metavar="NAME")]
    """As it was deployed."""

    def run(self) -> int:
        from jaxcls.serving.deployment import Deployment

        Deployment(self.name).delete()
        return DONE


@dataclass(frozen=True, kw_only=True)
class Loadtest(Command):
    """Put a service under load, and write a report. Exit code 1: requests failed, or p99 was missed.

    Requests that the service refuses as too many (429, 503) are counted apart and are no failures.
    """

    uses_jax = False

    url: Positional[str]
    """The service's address, such as http://127.0.0.1:8000."""
    images: Path
    """A folder of images, sent in turn."""
    rate: float | None = None
    """Requests per second, which come whatever becomes of those before."""
    users: int | None = None
    """Instead of --rate: how many users, each of whom waits for an answer before asking again."""
    duration: float = 30.0
    """Seconds."""
    key_file: Path | None = None
    """A file whose first line, # comments aside, is the key."""
    p99_ms: float | None = None
    """The objective: 99 % of the good answers within so many milliseconds."""
    out: Path | None = None
    """A new folder for report.html, report.json and goodput.png."""

    def run(self) -> int:
        from jaxcls.serving.load_test import Load, choose_images, load_test

        if self.out is not None and self.out.exists():
            raise UsageError(f"{self.out} exists: give a new folder")
        load = Load(
            url=self.url,
            images=choose_images(self.images),
            rate=self.rate,
            users=self.users,
            seconds=self.duration,
            key=_service_key(self.key_file),
        )
        report = load_test(load, p99_ms=self.p99_ms)
        print(report)
        out = self.out or _new_output("loadtest")
        report.write(out)
        print(f"report: {out / 'report.html'}")
        if report.is_interrupted:
            return INTERRUPTED
        return FAILED if report.problems else DONE


@dataclass(frozen=True, kw_only=True)
class Docker(Command):
    """Write what a container image that serves a classifier is built from, and build it where Docker runs."""

    uses_jax = False

    model: Annotated[Positional[Path], tyro.conf.arg(metavar="CLASSIFIER")]
    """A saved classifier."""
    out: Path | None = None
    """A new folder for the build context."""
    tag: str = "jaxcls"
    """The image's name."""
    cuda: bool = False
    """For NVIDIA GPUs."""

    def run(self) -> int:
        from jaxcls.serving import docker

        context = docker.write_context(self.model, self.out or _new_output("docker"), cuda=self.cuda)
        print(f"build context: {context}")
        build = docker.build_command(context, self.tag)
        if docker.has_engine():
            if subprocess.run(build).returncode:
                return FAILED
        else:
            print(f"no Docker engine answers here; where one does: {shlex.join(build)}")
        print(f"run it: {docker.run_command(self.tag, cuda=self.cuda)}")
        return DONE


COMMANDS = (
    Quickstart, Info, Train, Svm, Evaluate, Predict, Export, Serve, Deploy, List, Delete, Score, Loadtest,
    Docker,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Training that is asked to end by SIGTERM exits with 143.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            {kind.__name__.lower(): kind for kind in COMMANDS},
            prog="jaxcls",
            description=f"jaxcls {jaxcls.__version__}: {jaxcls.__doc__.partition(chr(10))[0]}",
            args=arguments,
        )
        if command.uses_jax:
            from jaxcls.parallel import use_compilation_cache

            use_compilation_cache(Storage.default().persistent / "compiled")
        return command.run()
    except BrokenPipeError:
        # The reader, such as `head`, has gone. Point the stream elsewhere, or its flush at exit fails too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (JaxclsError, OSError) as error:
        if "--debug" in arguments:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"jaxcls: {message}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        print("jaxcls: interrupted", file=sys.stderr)
        return INTERRUPTED


def _report(classifier: jaxcls.Classifier, dataset: jaxcls.Dataset, out: Path | None = None) -> int:
    """Print the evaluation; write predictions and plot into `out`."""
    plots = jaxcls.evaluation.plots
    predictions = jaxcls.predict(classifier, dataset, progress=True)
    evaluation = jaxcls.evaluate(predictions)
    print(evaluation)
    for message in predictions.errors.values():
        print(f"jaxcls: {message}", file=sys.stderr)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with _open(out / "predictions.csv") as file:
            predictions.write_csv(file)
        plots.save(plots.plot_confusion_matrix(evaluation), out / "confusion.png")
        print(f"predictions.csv and confusion.png: {out}")
    return FAILED if predictions.errors else DONE


def _print_table(predictions: jaxcls.Predictions) -> None:
    is_margin = predictions.kind == "margin"
    values = predictions.scores if is_margin else predictions.probabilities()
    rows = [("image", "class", "margin" if is_margin else "probability")]
    for row, score, label in zip(predictions.rows(), values.max(axis=1), predictions.predicted, strict=True):
        if row["error"] is not None:
            rows.append((row["id"], "(error)", row["error"]))
        else:
            rows.append((row["id"], row["predicted"] or "(abstained)", f"{score:.4f}" if label >= 0 else ""))
    _print_columns(rows)


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())


def _feature_cache() -> Path:
    return Storage.default().persistent / "features"


def _note(text: str) -> None:
    print(text, file=sys.stderr)


def _describe_installation() -> str:
    import jax

    from jaxcls.models.pretrained import CATALOGUE, unverified_names

    devices = jax.devices()
    lines = [
        f"jaxcls {jaxcls.__version__}, jax {jax.__version__}, {len(devices)} x {devices[0].device_kind}",
        str(Storage.default()),
        "backbones: " + ", ".join(CATALOGUE),
        "pinned at the first download, no checksum being published: " + ", ".join(unverified_names()),
    ]
    return "\n".join(lines)


def _describe_classifier(path: Path) -> str:
    from jaxcls.scoring import check_parity

    classifier = jaxcls.load(path)
    difference = check_parity(classifier, path)
    names = ", ".join(classifier.classes[:20]) + (", ..." if len(classifier.classes) > 20 else "")
    return "\n".join(
        [
            repr(classifier),
            f"classes: {names}",
            f"scores: {classifier.head.kind}",
            f"made by: {json.dumps(dict(classifier.provenance), ensure_ascii=False)}",
            f"backbone: {json.dumps(dict(classifier.backbone.provenance), ensure_ascii=False)}",
            f"parity: scores its stored images as when saved (relative difference {difference:.1e})",
        ]
    )


def _open_service(service: str, key_file: Path | None) -> Client:
    """The service at an address, or deployed under a name."""
    from jaxcls.serving.client import Client, is_url

    if not is_url(service):
        from jaxcls.serving.deployment import Deployment

        return Deployment(service).connect()
    return Client(service, _service_key(key_file))


def _service_key(key_file: Path | None) -> str | None:
    """The first key in a file; without one, the environment's."""
    if key_file is None:
        return os.environ.get(KEY_VARIABLE)
    for line in _read_lines(key_file):
        if key := line.partition("#")[0].strip():
            return key
    raise UsageError(f"{key_file} holds no key")


def _open(path: Path | None) -> AbstractContextManager[TextIO]:
    if path is None:
        return nullcontext(sys.stdout)
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def _is_classifier(path: Path) -> bool:
    from jaxcls.manifest import MANIFEST

    return (path / MANIFEST).is_file()


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Files as they are; of folders, the images below them."""
    from jaxcls.data.folder import list_images

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            listing = list_images(path)
            found = sorted(listing.images + listing.not_utf8)
            if not found:
                raise UsageError(f"{path} holds no images")
            files += [path / image for image in found]
        else:
            files.append(path)
    if not files:
        raise UsageError("give at least one image or folder")
    return files


def _read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines: a file name may hold what Unicode counts as a line's end.
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _new_output(command: str) -> Path:
    return Storage.default().outputs / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"


if __name__ == "__main__":
    sys.exit(main())
