"""Exported programs: that they score as the network does, what they are, and what can be wrong with them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.export
import numpy as np
import pytest

from jaxcls.classifier import create_model, load, load_program
from jaxcls.cli import main
from jaxcls.errors import ClassifierError, UsageError
from jaxcls.program import serialize_program
from jaxcls.scoring import make_scorer
from jaxcls.storage import file_sha256

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


@pytest.fixture(scope="module")
def classifier(compilation_cache):
    return create_model("resnet18", ("a", "b", "c"), image_size=32, seed=5)


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    """A saved classifier with programs for both platforms."""
    path = classifier.save(tmp_path_factory.mktemp("exported") / "photos.jaxcls")
    files = classifier.export(path)
    assert files == (path / "program" / "cpu.bin", path / "program" / "cuda.bin")
    return path


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(exported, tmp_path / "copy")


def read(path):
    return json.loads((path / "classifier.json").read_text(encoding="utf-8"))


def edit(path, **fields):
    (path / "classifier.json").write_text(json.dumps(read(path) | fields), encoding="utf-8")


def put_program(path, platform, content):
    """Replace a program with its checksum: to the manifest it is whole."""
    file = path / "program" / f"{platform}.bin"
    file.write_bytes(content)
    entry = {"sha256": file_sha256(file), "dtype": "float32"}
    edit(path, programs=read(path).get("programs", {}) | {platform: entry})


@pytest.fixture(scope="module")
def live_scores(classifier):
    return make_scorer(classifier, batch_sizes=(len(IMAGES),), precision="float32")(IMAGES)


def test_a_new_process_scores_as_the_live_network(exported, live_scores, tmp_path):
    """It never builds the network: its code is taken away."""
    np.save(tmp_path / "images.npy", IMAGES)
    program = (
        "import sys, numpy, jaxcls\n"
        "from jaxcls import classifier\n"
        "score = jaxcls.load_program(sys.argv[1])\n"
        "classifier.Forward.__call__ = None\n"
        "numpy.save(sys.argv[3], score(numpy.load(sys.argv[2])))\n"
    )
    arguments = [exported, tmp_path / "images.npy", tmp_path / "scores.npy"]
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=120)
    scores = np.load(tmp_path / "scores.npy")
    assert (scores.dtype, scores.shape) == (np.float32, (5, 3))
    np.testing.assert_allclose(scores, live_scores, rtol=0, atol=1e-5 * np.abs(live_scores).max())


@pytest.mark.parametrize("platform", DTYPES)
def test_a_program_is_for_its_platform_and_any_batch_size(exported, platform):
    file = exported / "program" / f"{platform}.bin"
    assert file.stat().st_size < 500_000  # the weights are 45 MB
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    assert program.platforms == (platform,)
    assert program.nr_devices == 1
    oldest = jax.export.minimum_supported_calling_convention_version
    newest = jax.export.maximum_supported_calling_convention_version
    assert oldest <= program.calling_convention_version <= newest
    images, scores = program.in_avals[-1], program.out_avals[0]
    batch_size = images.shape[0]
    assert jax.export.is_symbolic_dim(batch_size)
    assert (images.dtype, images.shape) == (np.uint8, (batch_size, 32, 32, 3))
    assert (scores.dtype, scores.shape) == (np.float32, (batch_size, 3))
    assert read(exported)["programs"][platform] == {
        "sha256": file_sha256(file),
        "dtype": DTYPES[platform],
        "jax": jax.__version__,
    }
    assert ("bf16" in program.mlir_module()) == (DTYPES[platform] == "bfloat16")


def test_a_program_for_cpus_in_bfloat16(classifier, live_scores, tmp_path):
    path = classifier.save(tmp_path / "classifier")
    classifier.export(path, ["cpu"], precision="bfloat16")
    score = load_program(path)
    scale = np.abs(live_scores).max()
    for images, expected in ((IMAGES, live_scores), (IMAGES[:1], live_scores[:1])):
        assert 1e-5 * scale < np.abs(score(images) - expected).max() < 0.02 * scale


@pytest.mark.slow
def test_the_weights_are_arguments(exported, tmp_path):
    """One classifier's program scores as another of its form, with the weights that lie beside it."""
    program = (exported / "program" / "cpu.bin").read_bytes()
    other = create_model("resnet18", ("a", "b", "c"), image_size=32, seed=6)
    path = other.save(tmp_path / "other")
    (path / "program").mkdir()
    put_program(path, "cpu", program)
    expected = make_scorer(other, batch_sizes=(len(IMAGES),), precision="float32")(IMAGES)
    np.testing.assert_allclose(load_program(path)(IMAGES), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["temperature", "sigmoid"])
def test_a_program_calibrates(classifier, live_scores, tmp_path, calibration):
    head = replace(classifier.head, kind="probability", calibration=calibration)
    calibrated = replace(classifier, head=head)
    path = calibrated.save(tmp_path / "calibrated")
    calibrated.export(path, ["cpu"])
    chances = np.exp(live_scores) if calibration == "temperature" else 1 / (1 + np.exp(-live_scores))
    expected = chances / chances.sum(1, keepdims=True)
    np.testing.assert_allclose(load_program(path)(IMAGES), expected, rtol=1e-4)
    with pytest.raises(ClassifierError, match="holds another classifier: save this one"):
        classifier.export(path, ["cpu"])


def test_what_the_hub_folder_says_of_calibrated_scores(classifier, tmp_path):
    def notes(**changes):
        return replace(classifier, head=replace(classifier.head, **changes)).hub_notes

    assert notes(kind="probability", calibration="temperature") == ()  # their softmax is the probability
    (note,) = notes(kind="probability", calibration="sigmoid")
    assert "the logistic function, divided by its sum over the classes" in note
    assert "no probability" in notes(kind="margin")[0]
    head = replace(classifier.head, kind="probability", calibration="sigmoid")
    path = replace(classifier, head=head).export_hub(tmp_path / "hub")
    assert note in (path / "README.md").read_text(encoding="utf-8")


def test_other_images_are_refused(exported):
    score = load_program(exported)
    for images in (IMAGES.astype(np.float32), IMAGES[0], IMAGES[:, :31], IMAGES[..., :1]):
        with pytest.raises(UsageError, match=r"images must be uint8 \[B, 32, 32, 3\]"):
            score(images)
    with pytest.raises(UsageError, match="no images"):
        score(IMAGES[:0])


def test_a_folder_without_programs_loads_and_says_how_to_make_one(copy):
    (copy / "program" / "cpu.bin").unlink()
    load(copy)
    command = f"jaxcls export {copy} --platforms cpu"
    with pytest.raises(ClassifierError, match=f"no program for cpu, only for cuda: .*{command}"):
        load_program(copy)
    shutil.rmtree(copy / "program")
    manifest = read(copy)
    del manifest["programs"]  # as before the first export
    (copy / "classifier.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ClassifierError, match=f"no program for cpu, nor for any other platform: .*{command}"):
        load_program(copy)
    load(copy).export(copy, ["cpu"])
    assert set(read(copy)["programs"]) == {"cpu"}
    load_program(copy)


@pytest.mark.parametrize("reader", [load, load_program])
@pytest.mark.parametrize("platform", DTYPES)
def test_a_damaged_program_is_named_with_the_way_out(copy, platform, reader):
    file = copy / "program" / f"{platform}.bin"
    file.write_bytes(file.read_bytes()[:-10])
    way_out = f"delete it, then write it with `jaxcls export {copy} --platforms {platform}`"
    with pytest.raises(ClassifierError, match=rf"program/{platform}\.bin is damaged .*{way_out}"):
        reader(copy)


@pytest.mark.parametrize(
    "programs",
    [
        [],
        "cpu",
        {"../../etc/passwd": {"sha256": "0" * 64}},
        {"cpu": "0" * 64},
        {"cpu": {"dtype": "float32"}},
        {"cpu": {"sha256": "0" * 64}},
    ],
)
def test_an_edited_list_of_programs_is_refused(copy, programs):
    edit(copy, programs=programs)
    with pytest.raises(ClassifierError, match=r"classifier\.json .* programs"):
        load(copy)


def test_a_program_that_does_not_fit_is_refused_though_its_checksum_does(classifier, copy):
    def serialize(network, platform):
        return serialize_program(network.forward, network.folded_weights("float32"), 32, platform)

    programs = {
        "takes other weights or images": serialize(create_model("resnet18", 4, image_size=32), "cpu"),
        "it is for cuda": serialize(classifier, "cuda"),
        f"jax {jax.__version__} cannot read it": b"no program",
    }
    for reason, content in programs.items():
        put_program(copy, "cpu", content)
        with pytest.raises(ClassifierError, match=f"{reason}.*jaxcls export {copy} --platforms cpu"):
            load_program(copy)


def test_only_the_classifier_that_is_saved_there_is_exported(classifier, copy, tmp_path):
    before = read(copy)
    head = replace(classifier.head, bias=classifier.head.bias + 1)
    for other in (replace(classifier, head=head), create_model("resnet18", 3, image_size=33)):
        with pytest.raises(ClassifierError, match="holds another classifier: save this one"):
            other.export(copy)
    with pytest.raises(ClassifierError, match="is no saved classifier"):
        classifier.export(tmp_path / "none")
    assert read(copy) == before


@pytest.mark.parametrize("platforms", [(), ("tpu",), ("cpu", "gpu")])
def test_unknown_platforms_are_refused(classifier, exported, platforms):
    with pytest.raises(UsageError, match="choose from cpu, cuda"):
        classifier.export(exported, platforms)


def test_a_program_that_scores_otherwise_is_not_written(classifier, copy, monkeypatch):
    shutil.rmtree(copy / "program")
    forward = type(classifier.forward)
    call = forward.__call__
    monkeypatch.setattr(forward, "__call__", lambda self, *arguments: 1.01 * call(self, *arguments))
    with pytest.raises(ClassifierError, match="scores differ from the saved ones"):
        classifier.export(copy)
    assert not (copy / "program").exists()


def test_a_full_disk_costs_no_more_than_the_program(classifier, copy, monkeypatch):
    write = Path.write_bytes

    def fail(path, content):
        if path.parent.name == "program":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(ClassifierError, match=r"cannot export to .*No space left"):
        classifier.export(copy, ("cpu",))
    assert load(copy).classes == ("a", "b", "c")
    assert set(read(copy)["programs"]) == {"cuda"}


def test_saving_again_leaves_no_program_of_the_old_classifier(classifier, copy):
    classifier.save(copy)
    assert "programs" not in read(copy)
    assert not (copy / "program").exists()


# The command.


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCLS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("jaxcls.parallel.use_compilation_cache", lambda folder: None)


def test_the_command_writes_programs(exported, copy, capsys):
    shutil.rmtree(copy / "program")
    assert main(["export", str(copy), "--platforms", "cuda", "--precision", "float32"]) == 0
    assert capsys.readouterr().out == f"program: {copy}/program/cuda.bin\n"
    assert read(copy)["programs"]["cuda"]["dtype"] == "float32"
    assert read(copy)["programs"]["cpu"] == read(exported)["programs"]["cpu"]


def test_the_command_writes_a_folder_for_transformers_instead(classifier, tmp_path, capsys):
    margins = replace(classifier, head=replace(classifier.head, kind="margin"))
    path = str(margins.save(tmp_path / "svm"))
    assert main(["export", path, "--hub-folder", str(tmp_path / "hub")]) == 0
    assert "each class's margin" in capsys.readouterr().err
    assert not (tmp_path / "svm" / "program").exists()
    assert main(["export", path, "--hub-folder", str(tmp_path / "hub")]) == 2
    assert "hub exists: give a new folder" in capsys.readouterr().err


def test_the_commands_mistakes(classifier, tmp_path, capsys):
    assert main(["export", str(tmp_path / "none")]) == 1
    assert "is no saved classifier" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(tmp_path), "--platforms", "tpu"])
    assert exit_.value.code == 2
