"""The folder of a saved classifier: the names of its files, its manifest and their checksums."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from jaxcls.errors import ClassifierError, UsageError
from jaxcls.models.precision import PLATFORMS, Platform
from jaxcls.storage import file_sha256, write_whole

FORMAT = "jaxcls-classifier"
FORMAT_VERSION = 1
MANIFEST, WEIGHTS, PARITY = "classifier.json", "weights.safetensors", "parity.npz"
PROGRAMS: Mapping[str, str] = {platform: f"program/{platform}.bin" for platform in PLATFORMS}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in the folder `path`, its checksums' form checked.

    Raises:
        ClassifierError: it is missing, damaged, or of another format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        within = [folder for folder in path.glob("*") if (folder / MANIFEST).is_file()]
        hint = f"; did you mean {within[0]}?" if within else ""
        what = f"holds no readable {MANIFEST}" if path.exists() else "does not exist"
        raise ClassifierError(f"{path} is no saved classifier: it {what}{hint}") from error
    except (ValueError, RecursionError) as error:
        raise ClassifierError(f"{path / MANIFEST} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ClassifierError(f"{path / MANIFEST} is not the manifest of a {FORMAT}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ClassifierError(
            f"{path} has format {manifest.get('format_version')}, this jaxcls reads {FORMAT_VERSION}: "
            "use the jaxcls that wrote it, or a newer one"
        )
    if not isinstance(manifest.get("sha256"), dict) or set(manifest["sha256"]) != {WEIGHTS, PARITY}:
        raise ClassifierError(f"{path / MANIFEST} does not name the checksums of {WEIGHTS} and {PARITY}")
    programs = manifest.setdefault("programs", {})  # absent until the first export
    if not isinstance(programs, dict) or not set(programs) <= set(PROGRAMS):
        raise ClassifierError(f"{path / MANIFEST} names programs for platforms that are not known here")
    if not all(isinstance(entry, dict) and {"sha256", "dtype"} <= set(entry) for entry in programs.values()):
        raise ClassifierError(f"{path / MANIFEST} does not name the checksums and dtypes of its programs")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write or replace a folder's manifest in one step: it is never half written."""
    content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, content.encode())


def read_thresholds(path: Path) -> tuple[tuple[str, ...], list[float] | None]:
    """The K classes of a saved classifier, and K thresholds if it has any.

    Raises:
        ClassifierError: its manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    try:
        classes, thresholds = tuple(manifest["classes"]), manifest["head"]["thresholds"]
        if thresholds is not None and len(thresholds) != len(classes):
            raise ValueError(f"{len(thresholds)} thresholds of {len(classes)} classes")
    except (KeyError, TypeError, ValueError) as error:
        raise ClassifierError(f"{path / MANIFEST} is damaged: {error}") from error
    return classes, thresholds


def write_thresholds(path: Path, thresholds: Sequence[float] | None) -> None:
    """Store K thresholds in a saved classifier, or none; all else in it stays.

    Raises:
        ClassifierError: its manifest is missing or damaged.
        UsageError: not one value for each class, or one that float32 does not hold.
    """
    classes, _ = read_thresholds(path)
    if thresholds is not None:
        values = np.asarray(thresholds, np.float64)
        if values.shape != (len(classes),) or not (np.abs(values) <= np.finfo(np.float32).max).all():
            raise UsageError(f"{path}: thresholds need one finite value for each of {len(classes)} classes")
        thresholds = values.astype(np.float32).tolist()
    manifest = read_manifest(path)
    write_manifest(path, manifest | {"head": manifest["head"] | {"thresholds": thresholds}})


def check_file(path: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Raise ClassifierError unless `path / name` is there, as the manifest's checksum has it."""
    if not (path / name).is_file():
        raise ClassifierError(f"{path}: {name} is missing: copy the whole folder again")
    if file_sha256(path / name) != manifest["sha256"][name]:
        raise ClassifierError(f"{path}: {name} is damaged (its sha256 is not the manifest's): copy it again")


def check_programs(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ClassifierError if a program is there and damaged; those that were deleted are not missed."""
    for platform, entry in manifest["programs"].items():
        program = path / PROGRAMS[platform]
        if program.exists() and file_sha256(program) != entry["sha256"]:
            raise ClassifierError(
                f"{path}: {PROGRAMS[platform]} is damaged (its sha256 is not the manifest's): "
                f"delete it, then {_write_anew(path, platform)}"
            )


def read_program(path: Path, platform: str) -> tuple[bytes, str]:
    """A saved classifier's program for a platform, and the dtype of its convolutions.

    Raises:
        ClassifierError: there is none, or it is damaged.
    """
    manifest = read_manifest(path)
    check_programs(path, manifest)
    there = [name for name in manifest["programs"] if (path / PROGRAMS[name]).is_file()]
    if platform not in there:
        have = f"only for {', '.join(there)}" if there else "nor for any other platform"
        raise ClassifierError(f"{path} has no program for {platform}, {have}: {_write_anew(path, platform)}")
    return (path / PROGRAMS[platform]).read_bytes(), manifest["programs"][platform]["dtype"]


def write_program(path: Path, platform: Platform, program: bytes, dtype: str) -> Path:
    """Write or replace the program for a platform and return its path.

    Args:
        path: a saved classifier.
        platform: which the program is for.
        program: the file's content.
        dtype: of its convolutions.
    """
    manifest, file = read_manifest(path), path / PROGRAMS[platform]
    # First forgotten, then written: interrupted between, the classifier is whole without it.
    others = {name: entry for name, entry in manifest["programs"].items() if name != platform}
    write_manifest(path, manifest | {"programs": others})
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(program)
    entry = {"sha256": file_sha256(file), "dtype": dtype, "jax": version("jax")}
    write_manifest(path, manifest | {"programs": others | {platform: entry}})
    return file


def _write_anew(path: Path, platform: str) -> str:
    return f"write it with `jaxcls export {path} --platforms {platform}`"
