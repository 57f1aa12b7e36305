"""The service over HTTP: next to the bare scorer, at rest, overloaded, and next to LitServe."""

import base64
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import httpx2
import numpy as np

from benchmarks.load import Load, drive, refusals, serving
from benchmarks.peers import OURS
from benchmarks.photos import make_photos, scratch_folder
from benchmarks.programs import NUM_CLASSES
from benchmarks.session import Session, main
from benchmarks.timing import SubjectError
from experiments.recording import spread
from jaxcls.classifier import create_model, load
from jaxcls.data.images import open_photo
from jaxcls.parallel import use_compilation_cache
from jaxcls.scoring import make_scorer
from jaxcls.serving.config import BATCH_SIZES, ServiceConfig
from jaxcls.storage import Storage

BATCH_SIZE = max(BATCH_SIZES)
NUM_PHOTOS, PHOTO_SIDE = 32, 500
CONNECTIONS, MANY_CONNECTIONS, SECONDS, PROBE_SECONDS, OVERLOAD_SECONDS = 16, 48, 8, 4, 15
TINY_SECONDS = 3
OVERLOADS = (2, 10)
CONNECTIONS_REFUSED = 64
"""Beyond those whose requests fill the queue: each asks again a pause after it was refused."""
LIT_SETTINGS = tuple((w, *batch) for w, batch in product((1, 2), ((1, 0.0), (16, 0.0), (16, 0.005))))
"""LitServe's workers, largest batch, and seconds that a batch waits for company."""
PREDICT, INFER = "/v1/predict", "/v2/models/model/infer"
JPEG = {"Content-Type": "image/jpeg"}
JSON = {"Content-Type": "application/json"}


def run(session: Session) -> None:
    """The whole comparison, for the network's size, then LitServe also for a network of 32 px."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
    use_compilation_cache(Storage.default().persistent / "compiled")
    for depth in session.at(18).depths:
        bench = _Bench(session, depth, session.settings.image_size)
        bench.against_bare()
        bench.at_rest()
        bench.overloaded()
        bench.against_litserve()
        if session.settings.image_size != 32:
            _Bench(session, depth, 32).against_litserve()


class _Bench:
    """One network, saved and compiled, with its inputs."""

    def __init__(self, session: Session, depth: int, image_size: int) -> None:
        self.session, self.scratch = session, scratch_folder()
        self.values = {"depth": depth, "image_size": image_size, "batch_size": BATCH_SIZE}
        self.model = create_model(f"resnet{depth}", NUM_CLASSES, image_size=image_size).save(
            self.scratch / "model"
        )
        self.classifier = load(self.model)
        self.score = make_scorer(self.classifier, batch_sizes=(1, BATCH_SIZE))
        photos = make_photos(self.scratch / "photos", NUM_PHOTOS, PHOTO_SIDE)
        self.photos = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
        self.pixels = np.stack([self.decode(photo) for photo in self.photos])
        self.seconds = TINY_SECONDS if session.settings.tiny else SECONDS
        self.rounds = session.settings.rounds

    def decode(self, photo: bytes) -> np.ndarray:
        preprocess = self.classifier.preprocess
        return preprocess.resize_and_crop(open_photo(photo).decode(preprocess.short_side))

    def against_bare(self) -> None:
        """Images a second with and without HTTP, in turn."""
        batch = self.pixels[:BATCH_SIZE]
        tensors, headers = [tensor(batch)[0]], tensor(batch)[1]
        with self.service() as url, ThreadPoolExecutor() as pool:
            ways: dict[str, Callable[[], float]] = {
                "score_bare": lambda: self.bare_rate(lambda: batch),
                "serve_tensors": lambda: (
                    BATCH_SIZE * self.drive(url + INFER, tensors, headers, connections=3).good_per_second
                ),
                "score_photos": lambda: self.bare_rate(
                    lambda: np.stack(list(pool.map(self.decode, self.photos[:BATCH_SIZE])))
                ),
                "serve_photos": lambda: (
                    self.drive(url + PREDICT, self.photos, JPEG, connections=MANY_CONNECTIONS).good_per_second
                ),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(self.rounds):
                for name, rate in ways.items():
                    rates[name].append(rate())
            self.require_right_scores(url)
        for name, found in rates.items():
            self.put(name, OURS, {"images_per_second": spread(found), "rounds": found})

    def bare_rate(self, images: Callable[[], np.ndarray]) -> float:
        """Images a second that are made and scored, a batch after the other, without HTTP."""
        self.score(images())
        started, num_batches = time.perf_counter(), 0
        while time.perf_counter() - started < self.seconds:
            self.score(images())
            num_batches += 1
        return num_batches * BATCH_SIZE / (time.perf_counter() - started)

    def at_rest(self) -> None:
        """One JPEG at a time: what HTTP adds to decoding and scoring it."""
        with self.service() as url:
            alone, served = [], []
            for _ in range(self.rounds):
                started = time.perf_counter()
                for photo in self.photos:
                    self.score(self.decode(photo)[None])
                alone.append(1000 * (time.perf_counter() - started) / len(self.photos))
                served.append(self.drive(url + PREDICT, self.photos, JPEG, connections=1).p50_ms)
        self.put("at_rest", OURS, {"alone_ms": spread(alone), "p50_ms": spread(served)})

    def overloaded(self) -> None:
        """Requests at multiples of the peak's rate, each time right after the peak was measured.

        Good answers, how long the slowest of them took, and how soon the others are refused.
        """
        found: dict[int, list[dict[str, float]]] = {times: [] for times in OVERLOADS}
        with self.service() as url:
            for _, times in product(range(self.rounds), OVERLOADS):
                ask = partial(self.drive, url + PREDICT, self.photos, JPEG)
                peak = ask(connections=MANY_CONNECTIONS).good_per_second
                found[times].append(self.overload(url + PREDICT, times * peak, ask))
                found[times][-1]["share_of_peak"] = found[times][-1]["good_per_second"] / peak
        for times, rounds in found.items():
            values = {name: spread([one[name] for one in rounds]) for name in rounds[0]}
            self.put(f"overload_{times}x", OURS, values)

    def overload(self, url: str, rate: float, ask: Callable[..., Load]) -> dict[str, float]:
        """So many requests a second, for a while."""
        max_queue = ServiceConfig().max_queue
        seconds = TINY_SECONDS if self.session.settings.tiny else OVERLOAD_SECONDS
        with ThreadPoolExecutor(1) as pool:
            refused = pool.submit(refusals, url, JPEG, len(self.photos[0]), seconds)
            load = ask(
                connections=max_queue + CONNECTIONS_REFUSED,
                delay_ms=1000 * CONNECTIONS_REFUSED / rate,
                seconds=seconds,
            )
        waits = refused.result()
        return {
            **asdict(load),
            "asked_per_second": (load.good + load.busy) / load.seconds,
            # What the queue holds, and the batch that it waits for, at the rate at which it is emptied.
            "p99_bound_ms": 1000 * (max_queue + BATCH_SIZE) / load.good_per_second,
            "refused_p99_ms": float(np.percentile(waits, 99)),
            "refused_timed": len(waits),
        }

    def against_litserve(self) -> None:
        """The best of LitServe's settings by a short probe each; then both in turn, each with all cores."""
        if find_spec("litserve") is None:
            self.put("serve_single", "litserve", {"note": "skipped: needs litserve, which is not installed"})
            return
        if self.values["image_size"] == 32:  # decoded before
            kind, raw = "pixels", [image.tobytes() for image in self.pixels]
            tensors = [tensor(image[None]) for image in self.pixels]
            ours, headers, path = [body for body, _ in tensors], tensors[0][1], INFER
        else:
            kind, raw = "image", self.photos
            ours, headers, path = self.photos, JPEG, PREDICT
        bodies = [json.dumps({kind: base64.b64encode(image).decode()}).encode() for image in raw]
        candidates = LIT_SETTINGS[:2] if self.session.settings.tiny else LIT_SETTINGS
        best = max(candidates, key=partial(self.probe, bodies))
        found: dict[str, list[Load]] = {OURS: [], "litserve": []}
        for _ in range(self.rounds):
            with self.service() as url:
                found[OURS].append(self.drive(url + path, ours, headers, connections=CONNECTIONS))
            with self.litserve(best) as url:
                found["litserve"].append(self.drive(f"{url}/predict", bodies, JSON, connections=CONNECTIONS))
        settings = dict(zip(("workers", "largest_batch", "batch_timeout"), best, strict=True))
        for subject, loads in found.items():
            rates = [one.good_per_second for one in loads]
            values = {"images_per_second": spread(rates), "p99_ms": spread([one.p99_ms for one in loads])}
            own = {} if subject == OURS else settings
            self.put("serve_single", subject, {**values, "rounds": rates, **own})

    def probe(self, bodies: Sequence[bytes], settings: tuple[int, int, float]) -> float:
        try:
            with self.litserve(settings) as url:
                return self.drive(
                    f"{url}/predict", bodies, JSON, connections=CONNECTIONS, seconds=PROBE_SECONDS
                ).good_per_second
        except SubjectError as error:
            print(f"LitServe with {settings}: {error}")
            return 0.0

    def drive(self, url: str, bodies: Sequence[bytes], headers: Mapping[str, str], **how: Any) -> Load:
        found = drive(url, bodies, headers, self.scratch, **{"seconds": self.seconds, **how})
        if found.other or not found.good:
            raise SubjectError(f"{found.other} answers were neither good nor refusals: {found}")
        return found

    @contextmanager
    def service(self) -> Iterator[str]:
        options = ("--port", "0", "--name", "model", "--grace-seconds", "0")
        command = ("-m", "jaxcls.cli", "serve", str(self.model), *options)
        with serving(command, r"serving \S+: (\S+)") as url:
            yield url

    @contextmanager
    def litserve(self, settings: tuple[int, int, float]) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = ("-m", "benchmarks.lit_server", str(self.model), str(port), *map(str, settings))
        with serving(command, "(a worker is set up)"):
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while not _is_healthy(url):
                if time.monotonic() > deadline:
                    raise SubjectError("LitServe is not healthy within a minute")
            yield url

    def require_right_scores(self, url: str) -> None:
        """Raise SubjectError unless the service scores a photo as the bare scorer does."""
        answer = httpx2.post(url + PREDICT, content=self.photos[0], headers=JPEG).json()
        scores = list(answer["predictions"][0]["scores"].values())
        if not np.allclose(scores, self.score(self.pixels[:1])[0], rtol=1e-4, atol=1e-5):
            raise SubjectError("the service scores a photo otherwise than the scorer does")

    def put(self, work: str, subject: str, values: Mapping[str, Any]) -> None:
        self.session.put("serving", self.session.task(work, subject, **self.values), values)


def tensor(images: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """The body of a request of the Open Inference Protocol, and its headers."""
    tensor = {
        "name": "images",
        "datatype": "UINT8",
        "shape": images.shape,
        "parameters": {"binary_data_size": images.nbytes},
    }
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
    header = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}
    return header + images.tobytes(), {"Content-Type": "application/octet-stream", **length}


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        time.sleep(0.1)
        return False


if __name__ == "__main__":
    main("serving", run, __doc__)
