"""One replica, reached in four ways: as a process of this machine, and in a Ray cluster by three ingresses.

All of them wait while one is asked. `tensors` are pixels for a network of 32 px, so that what is between the
client and the network counts; `photos` are JPEGs for one of the asked-for size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.load import Load, drive, serving
from benchmarks.photos import make_photos, scratch_folder
from benchmarks.programs import NUM_CLASSES
from benchmarks.serving import CONNECTIONS, JPEG, NUM_PHOTOS, PHOTO_SIDE, PREDICT, tensor
from benchmarks.session import Session, main
from benchmarks.timing import SubjectError
from experiments.recording import spread
from jaxcls.classifier import create_model
from jaxcls.parallel import use_compilation_cache
from jaxcls.storage import Storage

SECONDS, REST_SECONDS, TINY_SECONDS, TINY_REST_SECONDS = 5, 2, 3, 1
TENSORS, PHOTOS = "tensors", "photos"


@dataclass(frozen=True)
class Work:
    """What is asked of a classifier.

    Attributes:
        name: of the classifier.
        path: of the endpoint.
        bodies, headers: of requests of one image each.
    """

    name: str
    path: str
    bodies: Sequence[bytes]
    headers: Mapping[str, str]


def run(session: Session) -> None:
    """Rounds of all ways in turn, and a row for each way and work."""
    use_compilation_cache(Storage.default().persistent / "compiled")
    scratch = scratch_folder()
    for depth in session.at(18).depths:
        sizes = {TENSORS: 32, PHOTOS: session.settings.image_size}
        models = {
            name: create_model(f"resnet{depth}", NUM_CLASSES, image_size=size).save(scratch / name)
            for name, size in sizes.items()
        }
        works = _works(scratch)
        with _services(models) as urls:
            found: dict[tuple[str, str], list[tuple[Load, Load]]] = {
                (subject, work.name): [] for subject, work in product(urls, works)
            }
            is_tiny = session.settings.tiny
            seconds = TINY_SECONDS if is_tiny else SECONDS
            rest_seconds = TINY_REST_SECONDS if is_tiny else REST_SECONDS
            for _, work, subject in product(range(session.settings.rounds), works, urls):
                ask = partial(_ask, urls[subject][work.name], work, scratch)
                busy = ask(connections=CONNECTIONS, seconds=seconds)
                found[subject, work.name].append((busy, ask(connections=1, seconds=rest_seconds)))
        for (subject, name), loads in found.items():
            rates = [busy.good_per_second for busy, _ in loads]
            values = {
                "images_per_second": spread(rates),
                "rounds": rates,
                "p99_ms": spread([busy.p99_ms for busy, _ in loads]),
                "at_rest_p50_ms": spread([rest.p50_ms for _, rest in loads]),
            }
            task = session.task(name, subject, depth=depth, image_size=sizes[name])
            session.put("ray_serving", task, values)


def _works(scratch: Path) -> tuple[Work, Work]:
    images = np.random.default_rng(0).integers(0, 256, (NUM_PHOTOS, 32, 32, 3), np.uint8)
    tensors = [tensor(image[None]) for image in images]
    photos = make_photos(scratch / "jpegs", NUM_PHOTOS, PHOTO_SIDE)
    jpegs = [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]
    return (
        Work(TENSORS, f"/v2/models/{TENSORS}/infer", [body for body, _ in tensors], tensors[0][1]),
        Work(PHOTOS, PREDICT, jpegs, JPEG),
    )


@contextmanager
def _services(models: Mapping[str, Path]) -> Iterator[dict[str, dict[str, str]]]:
    """Way -> name of a classifier -> where it is served."""
    with ExitStack() as stack:
        local = {
            name: stack.enter_context(serving(_serve_command(name, model), r"serving \S+: (\S+)"))
            for name, model in models.items()
        }
        classifiers = [f"{name}={model}" for name, model in models.items()]
        urls = {"local": local}
        for ingress in ("haproxy", "proxy"):
            command = ("-m", "benchmarks.ray_server", ingress, *classifiers)
            port, *replicas = stack.enter_context(serving(command, "serving: (.*)")).split()
            urls[f"ray-{ingress}"] = {name: f"http://127.0.0.1:{port}/{name}" for name in models}
            if replicas:
                pairs = zip(models, replicas, strict=True)
                urls["ray-direct"] = {name: f"http://127.0.0.1:{own}/{name}" for name, own in pairs}
        yield urls


def _serve_command(name: str, model: Path) -> tuple[str, ...]:
    return ("-m", "jaxcls.cli", "serve", str(model), "--port", "0", "--name", name, "--grace-seconds", "0")


def _ask(url: str, work: Work, scratch: Path, *, connections: int, seconds: float) -> Load:
    found = drive(
        url + work.path, work.bodies, work.headers, scratch, connections=connections, seconds=seconds
    )
    if found.other or found.busy or not found.good:
        raise SubjectError(f"{url} did not answer well: {found}")
    return found


if __name__ == "__main__":
    main("ray_serving", run, __doc__)
