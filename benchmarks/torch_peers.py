"""torch as the peer. A subject is "torch-MODE-DTYPE", channels_last unless it ends in "-contiguous".

Its images lie on the device as normalised pixels, in its own layout and for scoring in its own dtype:
it is spared the normalisation that jaxcls does inside its programs.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from benchmarks.programs import NUM_CLASSES, NUM_INPUTS, Scoring, random_images, random_labels
from benchmarks.timing import Program, SubjectError
from benchmarks.worker import Task

# `jaxcls.models.resnet.ARCHITECTURES` would load JAX into this process.
STAGE_SIZES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = (64, 128, 256, 512)
COMPILE_MODES = {"eager": None, "compile": "default", "maxautotune": "max-autotune"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Settings:
    """The parts of a subject's name."""

    mode: str
    dtype: torch.dtype
    memory_format: torch.memory_format

    @classmethod
    def of(cls, subject: str) -> Self:
        """Read "torch-MODE-DTYPE[-contiguous]"."""
        _, mode, dtype, *layout = subject.split("-")
        memory_format = torch.contiguous_format if layout else torch.channels_last
        return cls(mode, getattr(torch, dtype), memory_format)

    @property
    def details(self) -> dict[str, Any]:
        """What rows say."""
        return {"dtype": str(self.dtype).removeprefix("torch.")}


def train(task: Task) -> Program:
    """SGD with momentum, autocast where the dtype is bfloat16."""
    return _Training(task, Settings.of(task.subject))


def score(task: Task) -> Program:
    """The network in its dtype, under `inference_mode`."""
    settings = Settings.of(task.subject)
    network = _compiled(_network(task, settings).eval().to(settings.dtype), settings)
    inputs = [_pixels(task, settings, n).to(settings.dtype) for n in range(NUM_INPUTS)]

    def call(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            # A copy: a CUDA graph writes each result over the one before.
            return _logits(network(pixels)).clone()

    start = time.perf_counter()
    _wait(call(inputs[0]))
    return Scoring(
        call,
        inputs,
        finish=_wait,
        to_host=lambda result: result.float().cpu().numpy(),
        images_per_step=task.batch_size,
        details={**settings.details, "compile_seconds": time.perf_counter() - start},
    )


def first_score(task: Task) -> dict[str, Any]:
    """One batch scored in a new process."""
    program = score(task)
    return {"step_seconds": program.time(1), **program.details}


class _Training(Program):
    """Counted by batch norm's own `num_batches_tracked`."""

    def __init__(self, task: Task, settings: Settings) -> None:
        self._network = _network(task, settings).train()
        self._run_network = _compiled(self._network, settings)
        self._optimizer = torch.optim.SGD(
            self._network.parameters(), 0.001, momentum=0.9, fused=DEVICE == "cuda"
        )
        self._batches = [
            (
                _pixels(task, settings, n),
                torch.from_numpy(random_labels(task.batch_size, n)).long().to(DEVICE),
            )
            for n in range(NUM_INPUTS)
        ]
        self._autocast: Callable[[], Any] = (
            nullcontext
            if settings.dtype is torch.float32
            else lambda: torch.autocast(DEVICE, dtype=settings.dtype)
        )
        self._norm = [part for part in self._network.modules() if isinstance(part, nn.BatchNorm2d)][-1]
        self._weights, self._num_seen = self._final_weights(), 0
        self.images_per_step = task.batch_size
        start = time.perf_counter()
        self.run(1)
        self.details = {**settings.details, "compile_seconds": time.perf_counter() - start}

    def run(self, num_steps: int) -> None:
        for number in range(num_steps):
            pixels, labels = self._batches[number % NUM_INPUTS]
            with self._autocast():
                loss = nn.functional.cross_entropy(_logits(self._run_network(pixels)), labels)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
        _wait(loss)
        self._loss = float(loss.detach())

    def num_executed(self) -> int:
        tracked = self._norm.num_batches_tracked
        assert isinstance(tracked, torch.Tensor)
        weights = self._final_weights()
        if not np.isfinite(self._loss):
            raise SubjectError(f"the loss is {self._loss}")
        if self._num_seen != int(tracked) and np.array_equal(weights, self._weights):
            raise SubjectError("the weights are the same after the steps as before")
        self._weights, self._num_seen = weights, int(tracked)
        return self._num_seen

    def _final_weights(self) -> np.ndarray:
        *_, last = self._network.parameters()
        return last.detach().float().cpu().numpy().copy()


def _network(task: Task, settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # float32 says float32, here as in jaxcls
    # torch's annotations leave out `memory_format`.
    return _untrained(task.depth).to(DEVICE, memory_format=settings.memory_format)  # type: ignore[call-overload]


def _untrained(depth: int) -> nn.Module:
    """torchvision's ResNet, or transformers' where there is no torchvision."""
    try:
        import torchvision
    except ModuleNotFoundError:
        from transformers import ResNetConfig, ResNetForImageClassification

        bottleneck = depth >= 50
        config = ResNetConfig(
            layer_type="bottleneck" if bottleneck else "basic",
            depths=list(STAGE_SIZES[depth]),
            hidden_sizes=[width * (4 if bottleneck else 1) for width in WIDTHS],
            num_labels=NUM_CLASSES,  # type: ignore[call-arg]  # taken by the base class
        )
        return ResNetForImageClassification(config)
    return getattr(torchvision.models, f"resnet{depth}")(weights=None)


def _compiled(network: nn.Module, settings: Settings) -> Callable[..., Any]:
    mode = COMPILE_MODES[settings.mode]
    return network if mode is None else torch.compile(network, mode=mode)


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def _pixels(task: Task, settings: Settings, number: int) -> torch.Tensor:
    """Normalised, near enough, float32 [B, 3, H, W]."""
    images = random_images(task.batch_size, task.image_size, number)
    pixels = (images.astype(np.float32) - 118) / 58
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(DEVICE)
    return tensor.contiguous(memory_format=settings.memory_format)


def _wait(_: Any) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
