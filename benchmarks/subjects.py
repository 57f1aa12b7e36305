"""jaxcls as the subject: the only module of the benchmarks that knows how its programs are made."""

import os
import time
from typing import Any, cast

import jax
import numpy as np

from benchmarks import streams
from benchmarks.jax_programs import (
    JaxFeatures,
    JaxScoring,
    JaxTraining,
    compile_with_details,
    first_run,
    memory_of,
)
from benchmarks.photos import make_photos, num_photos, scratch_folder
from benchmarks.programs import (
    NUM_CLASSES,
    NUM_INPUTS,
    SAVED_CLASSIFIER,
    random_images,
    random_labels,
)
from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task
from jaxcls.classifier import Classifier, Forward, create_model, load
from jaxcls.data.folder import read_folder
from jaxcls.models.fold import fold_batch_norm
from jaxcls.models.precision import Precision, compute_dtype, scoring_dtype
from jaxcls.models.pretrained import Backbone
from jaxcls.models.resnet import make_apply
from jaxcls.parallel import batch_sharding, make_mesh, replicated, use_compilation_cache
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.optimizer import make_optimizer, make_schedule
from jaxcls.train.state import init_state
from jaxcls.train.step import make_train_step

# The default recipe, at a rate that random weights and labels bear too.
CONFIG = FinetuneConfig(learning_rates=(0.01,))
NUM_CURVE_STEPS = 50


def train(task: Task) -> Program:
    """The training step of `finetune`, on batches that are on the device."""
    step, state, batches, details = _compile_training(task)
    return JaxTraining(
        step,
        state,
        batches,
        step_of=lambda state: state.step,
        weights_of=lambda state: state.params["head"]["kernel"],
        images_per_step=task.batch_size,
        details=details,
    )


def score(task: Task) -> Program:
    """The program of `make_scorer`, on images that are on the device."""
    return JaxScoring(*_compile_scoring(task))


def features(task: Task) -> Program:
    """The program of `extract_features`, with the features copied to the host."""
    return JaxFeatures(*_compile_features(task))


def first_step(task: Task) -> dict[str, Any]:
    """One training step in a new process."""
    return first_run(train, task)


def save(task: Task) -> dict[str, Any]:
    """Save the classifier for `first_score`."""
    return {"path": str(_model(task).save(os.environ[SAVED_CLASSIFIER]))}


def first_score(task: Task) -> dict[str, Any]:
    """The saved classifier loaded and one batch scored, in a new process. To ask for its cost takes time."""

    def load_and_compile(task: Task) -> Program:
        classifier, dtype = load(os.environ[SAVED_CLASSIFIER]), _scoring_dtype(task)
        return JaxScoring(*_compile(task, classifier.forward, classifier.folded_weights(dtype), dtype))

    return first_run(load_and_compile, task)


def memory_train(task: Task) -> dict[str, Any]:
    """What the training step needs, compiled and not run."""
    return _compile_training(task)[-1]


def memory_score(task: Task) -> dict[str, Any]:
    """What the scoring program needs, compiled and not run."""
    return _compile_scoring(task)[-1]


def logits(task: Task) -> dict[str, Any]:
    """float32 [B, K] logits of fixed images under fixed weights, as nested lists."""
    program, inputs, _, details = _compile_scoring(task)
    return {"logits": np.asarray(program(inputs[0])).tolist(), "dtype": details["dtype"]}


def loss_curve(task: Task) -> dict[str, Any]:
    """The first losses from fixed weights on fixed batches."""
    step, state, batches, details = _compile_training(task)
    losses = []
    for number in range(NUM_CURVE_STEPS):
        state, loss = step(state, *batches[number % NUM_INPUTS])
        losses.append(loss)
    return {"losses": [float(loss) / task.batch_size for loss in losses], "dtype": details["dtype"]}


# How photos are read: a module of its own, whose processes load no JAX.
decode, input_pipeline, to_device = streams.decode, streams.input_pipeline, streams.to_device
read_records, read_resized_records = streams.read_records, streams.read_resized_records


def train_end_to_end(task: Task) -> Program:
    """`finetune` on photos in files."""
    return _Finetuning(task)


def short_run(task: Task) -> dict[str, Any]:
    """All of `finetune` on 41 photos of 640 x 480, 15 epochs: AMLPCV's walk-through."""
    from jaxcls.train.finetune import finetune

    dataset = read_folder(make_photos(scratch_folder(), 41, task.photo_side))
    backbone = _model(task).backbone
    started = time.perf_counter()
    result = finetune(dataset, backbone, FinetuneConfig(batch_size=task.batch_size), reporters=())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "num_steps": result.history[-1]["step"]}


def svm(task: Task) -> Program:
    """A fit of `LinearSVC`."""
    from benchmarks.jax_fitting import make_fitting  # loads scikit-learn, for which no other work should wait

    return make_fitting(task)


class _Finetuning(Program):
    """Two epochs of `finetune` a turn, by its own clock; the first warms up."""

    def __init__(self, task: Task) -> None:
        from jaxcls.train.finetune import finetune  # needs Grain and TensorBoard: say so in this row alone

        self._finetune, self._task = finetune, task
        folder = make_photos(scratch_folder(), num_photos(task.photo_side), task.photo_side)
        self._photos = read_folder(folder)
        self._backbone = _model(task).backbone
        use_compilation_cache(scratch_folder())  # each call makes its programs anew
        self.images_per_step, self.details = task.batch_size, {"dtype": _dtype(CONFIG.precision)}

    def run(self, num_steps: int) -> None:
        raise NotImplementedError("it has its own clock")

    def num_executed(self) -> int:
        raise NotImplementedError("`finetune` counts anew in each call")

    def time(self, num_steps: int, clock: Any = None) -> float:
        """Seconds of the second epoch, by the history's images per second."""
        num_images = num_steps * self.images_per_step
        by_class = np.argsort(self._photos.labels, kind="stable").reshape(len(self._photos.classes), -1)
        photos = self._photos.select(np.resize(by_class.T, num_images))  # all classes, however few steps
        config = FinetuneConfig(num_epochs=2, learning_rates=(0.01,), batch_size=self.images_per_step)
        result = self._finetune(photos, self._backbone, config, reporters=())
        if (executed := result.history[-1]["step"]) != 2 * num_steps:
            raise SubjectError(f"{executed} steps were done where {2 * num_steps} were timed")
        start, end = self._backbone.variables, result.classifier.backbone.variables
        if all(
            np.array_equal(a, b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(end), strict=True)
        ):
            raise SubjectError("the weights are the same after the steps as before")
        return num_images / result.history[-1]["images_per_second"]


def _compile_training(task: Task) -> tuple[Any, Any, list[tuple[Any, ...]], dict[str, Any]]:
    """The compiled step, its first state, its batches on the device, and its cost."""
    precision = _precision(task)
    optimizer = make_optimizer(CONFIG, make_schedule(CONFIG, steps_per_epoch=100))
    model, mesh = _model(task), make_mesh(task.batch_size)
    step = make_train_step(
        make_apply(model.backbone.architecture, dtype=compute_dtype(precision)),
        model.preprocess,
        optimizer,
        mesh,
        dropout=CONFIG.dropout,
        label_smoothing=CONFIG.label_smoothing,
        weights=None,
        ema_decay=None,
    )
    state = init_state(model.backbone, NUM_CLASSES, optimizer, seed=0, use_ema=False)
    state = jax.device_put(state, replicated(mesh))
    batches = [
        jax.device_put(
            (random_images(task.batch_size, task.image_size, n), random_labels(task.batch_size, n)),
            batch_sharding(mesh),
        )
        for n in range(NUM_INPUTS)
    ]
    compiled, details = compile_with_details(step, state, *batches[0], num_devices=mesh.size)

    def step_and_loss(state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
        state, sums = compiled(state, images, labels)
        return state, sums.loss

    return step_and_loss, state, batches, {"dtype": _dtype(precision), **details}


Compiled = tuple[Any, list[Any], int, dict[str, Any]]


def _compile_scoring(task: Task) -> Compiled:
    classifier, dtype = _model(task), _scoring_dtype(task)
    compiled = _compile(task, classifier.forward, classifier.folded_weights(dtype), dtype)
    return _with_cost(compiled, classifier.backbone)


def _compile_features(task: Task) -> Compiled:
    backbone, dtype = _model(task).backbone, _scoring_dtype(task)
    forward = Forward(backbone.architecture, backbone.preprocess)
    weights = {"backbone": fold_batch_norm(backbone.variables, dtype)}
    return _with_cost(_compile(task, forward, weights, dtype), backbone)


def _compile(task: Task, forward: Forward, weights: Any, dtype: str) -> Compiled:
    """The arguments of `JaxScoring`: program, images on the device, batch size, and what is known of it."""
    from jaxcls.scoring import compile_program

    start = time.perf_counter()
    program = compile_program(forward, weights, (task.batch_size,))
    compile_seconds = time.perf_counter() - start
    images = [random_images(task.batch_size, task.image_size, n) for n in range(NUM_INPUTS)]
    sharding = batch_sharding(make_mesh(task.batch_size))
    executable, _ = program.executables[task.batch_size]
    details = {"dtype": dtype, "compile_seconds": compile_seconds, "memory": memory_of(executable)}
    return program, [jax.device_put(image, sharding) for image in images], task.batch_size, details


def _with_cost(compiled: Compiled, backbone: Backbone) -> Compiled:
    program, images, batch_size, details = compiled
    return program, images, batch_size, {**_cost(backbone, details["dtype"], images[0]), **details}


def _cost(backbone: Backbone, dtype: str, images: jax.Array) -> dict[str, Any]:
    """FLOPs and bytes of the unfolded network: of the folded one's loops XLA counts one round alone."""
    apply, normalize = make_apply(backbone.architecture, dtype=np.dtype(dtype)), backbone.preprocess.normalize
    mesh = make_mesh(len(images))
    sharding = batch_sharding(mesh)

    def features(variables: Any, images: jax.Array) -> jax.Array:
        return apply(variables, normalize(images), train=False)[0]

    program = jax.jit(features, in_shardings=(None, sharding), out_shardings=sharding)
    _, details = compile_with_details(program, backbone.variables, images, num_devices=mesh.size)
    return details


def _precision(task: Task) -> Precision:
    """As the subject's name says, "jaxcls-bfloat16"; "jaxcls" is what the library chooses."""
    return cast(Precision, task.subject.partition("-")[2] or "auto")


def _scoring_dtype(task: Task) -> str:
    return scoring_dtype(_precision(task), task.image_size)


def _dtype(precision: Precision) -> str:
    return np.dtype(compute_dtype(precision)).name


def _model(task: Task) -> Classifier:
    return create_model(f"resnet{task.depth}", NUM_CLASSES, image_size=task.image_size)
