"""Datasets in TFDS's own format, written here with its public tools, against what TFDS itself reads."""

import ast
import io
import pickle
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxcls.data.tfds import read_tfds
from jaxcls.errors import DatasetError, ImageError

CLASSES = ("cup", "bowl", "plate")
LABELS = (0, 1, 2, 0, -1, 2, 0, 1, 2, 0)


def photo(number, kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number, 2 * number, 200)).save(file, kind)
    return file.getvalue()


def make_info(folder, name, features, supervised=None):
    """The description of a dataset that is about to be written."""
    folder = folder / name / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name="tests"
    )
    return tfds.core.DatasetInfo(
        builder=identity, features=tfds.features.FeaturesDict(features), supervised_keys=supervised
    )


def write(info, splits):
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4, file_format="array_record")
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()


IMAGE, LABEL = tfds.features.Image(), tfds.features.ClassLabel(names=CLASSES)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """`kitchen`: 10 training photos in 3 files and 4 test photos, with more features than are needed."""
    folder = tmp_path_factory.mktemp("tfds")
    features = {"image": IMAGE, "label": LABEL, "mask": tfds.features.Image(), "note": tfds.features.Text()}
    train = [
        {"image": photo(i), "label": LABELS[i], "mask": photo(i + 50), "note": f"n{i}"} for i in range(10)
    ]
    test = [{"image": photo(i, "JPEG"), "label": i % 3, "mask": photo(0), "note": ""} for i in range(10, 14)]
    write(make_info(folder, "kitchen", features, ("image", "label")), {"train": train, "test": test})
    return folder


SPLITS = [
    "train",
    "test",
    "train[:50%]",
    "train[25%:75%]",
    "train[-30%:]",
    "train[10%:33%]",
    "train[2:7]",
    "train[:3]",
    "train[-3:]",
    "train[:-4]",
    "train[1shard]",
    "train[:2shard]",
    "train[-1shard:]",
    "train+test",
    "train[:20%]+test[1:]+train[90%:]",
    "all",
    *tfds.even_splits("train", 3),
    *tfds.even_splits("train[:70%]+test", 2),
    tfds.Split.TEST,
    tfds.core.ReadInstruction("train", from_=20, to=80, unit="%"),
    tfds.core.ReadInstruction("test", from_=1, unit="abs") + "train[:1]",
]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_holds_what_tfds_reads(data_dir, split):
    decoders = {"image": tfds.decode.SkipDecoding(), "mask": tfds.decode.SkipDecoding()}
    expected = tfds.data_source("kitchen", split=split, data_dir=data_dir, download=False, decoders=decoders)
    found = read_tfds("kitchen", split=split, data_dir=data_dir)
    assert len(found) == len(expected) > 0
    assert [found.source[i] for i in range(len(found))] == [example["image"] for example in expected]
    assert found.labels.tolist() == [example["label"] for example in expected]
    assert found.classes == CLASSES


def test_ids_are_those_of_the_records_in_every_split(data_dir):
    whole = read_tfds("kitchen", data_dir=str(data_dir))
    assert whole.ids[:5].tolist() == [
        *(f"kitchen-train.array_record-00000__{position}" for position in range(4)),
        "kitchen-train.array_record-00001__0",
    ]
    part = read_tfds("kitchen", split="train[3:7]", data_dir=data_dir)
    assert part.ids.tolist() == whole.ids[3:7].tolist()
    selected = whole.select_ids(part.ids)
    assert [selected.source[i] for i in range(4)] == [part.source[i] for i in range(4)]


def test_images_stay_encoded_until_they_are_needed(data_dir):
    found = read_tfds("kitchen", split="all", data_dir=data_dir, max_pixels=100)
    assert found.source[12] == photo(12, "JPEG")
    assert found.source.path(12) is None
    np.testing.assert_array_equal(found.image(3), np.full((6, 11, 3), [3, 6, 200]))
    with pytest.raises(ImageError, match=r"kitchen-train.array_record-00002__1: 17 x 6 = 102 pixels"):
        found.image(9)
    assert found.labels.dtype == np.int32
    assert (found.name, len(found.filter(lambda _, name: name is None))) == ("kitchen", 1)
    assert pickle.loads(pickle.dumps(found.source))[7] == photo(7)


def test_no_tensorflow_no_jax_and_no_network(data_dir):
    code = """
import socket, sys

def refuse(*_):
    raise AssertionError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
from jaxcls.data.tfds import read_tfds
from jaxcls.errors import DatasetError
photos = read_tfds("kitchen", split="all", data_dir=sys.argv[1])
assert photos.image(13).shape == (6, 21, 3)
for name in ("mnist", "imagenet2012", "cats_vs_dogs"):  # datasets that TFDS has code for
    try:
        read_tfds(name, data_dir=sys.argv[1])
    except DatasetError as error:
        assert "is not prepared" in str(error)
    else:
        raise AssertionError(name)
assert not {"tensorflow", "jax"} & set(sys.modules)
"""
    command = [sys.executable, "-W", "error", "-c", code, str(data_dir)]
    subprocess.run(command, check=True)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("val", r"no split 'val': known are train \(10 images\), test \(4 images\)"),
        ("train[", "no split"),
        ("train[:500]", "no split"),
        ("train[150%:]", "no split"),
        ("all[:1]", "no split"),
        ("", "no split"),
        (None, "no split None"),
        (3, "no split 3"),
        ("train[:0]", r"is empty: known are train \(10 images\)"),
        ("train[5:2]", "is empty"),
        ("train+train[2:4]", "takes some images twice"),
        ("all+test", "takes some images twice"),
    ],
)
def test_splits_that_are_none(data_dir, split, message):
    with pytest.raises(DatasetError, match=message):
        read_tfds("kitchen", split=split, data_dir=data_dir)


def asked_for(error):
    """What the command in a message asks `tfds.builder` for."""
    python, option, code = shlex.split(str(error).partition("it: ")[2] or str(error).partition("folder: ")[2])
    assert (python, option) == ("python", "-c")
    first, call = ast.parse(code).body
    assert ast.unparse(first) == "import tensorflow_datasets as tfds"
    assert call.value.func.attr == "download_and_prepare"
    builder = call.value.func.value
    assert ast.unparse(builder.func) == "tfds.builder"
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in builder.keywords}
    return ast.literal_eval(builder.args[0]), options


@pytest.mark.parametrize("name", ["mnist", "kitchen:2.0.0", "kitchen/small", "nobody_has_this"])
def test_not_prepared_says_which_command_does_it(data_dir, name):
    with pytest.raises(DatasetError, match=r"is not prepared in .* this prepares it: ") as raised:
        read_tfds(name, data_dir=data_dir)
    assert asked_for(raised.value) == (name, {"data_dir": str(data_dir), "file_format": "array_record"})


def test_names_that_are_none(data_dir):
    for name in ("a b", "../kitchen", ""):
        with pytest.raises(DatasetError):
            read_tfds(name, data_dir=data_dir)


def test_another_file_format_says_which_command_prepares_it(tmp_path):
    # TFRecords are written by TensorFlow alone; the description of a dataset that has none yet says enough.
    info = make_info(tmp_path, "kitchen", {"image": IMAGE, "label": LABEL})
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=4, file_format="tfrecord")
    writer.initialize_splits(["train"])
    with pytest.raises(DatasetError, match="prepared as tfrecord, which has no random access") as raised:
        read_tfds("kitchen", data_dir=tmp_path)
    assert asked_for(raised.value) == ("kitchen", {"data_dir": "FOLDER", "file_format": "array_record"})


@pytest.mark.parametrize(
    ("features", "supervised", "message"),
    [
        ({"label": LABEL}, None, r"has 0 features that are Image, .* features are label \(ClassLabel\)"),
        ({"image": IMAGE}, None, "has 0 features that are ClassLabel"),
        ({"image": IMAGE, "a": LABEL, "b": LABEL}, None, "has 2 features that are ClassLabel"),
        ({"image": IMAGE, "other": IMAGE, "a": LABEL}, None, "has 2 features that are Image"),
        ({"image": tfds.features.Image(shape=(None, None, 1), dtype=np.float32), "a": LABEL}, None, "floats"),
    ],
)
def test_features_that_are_no_photos_with_a_label(tmp_path, features, supervised, message):
    write(make_info(tmp_path, "odd", features, supervised), {"train": []})
    with pytest.raises(DatasetError, match=message):
        read_tfds("odd", data_dir=tmp_path)


def test_the_only_image_and_label_need_no_naming_and_classes_may_be_numbers(tmp_path):
    features = {"picture": tfds.features.Image(), "kind": tfds.features.ClassLabel(num_classes=2)}
    write(make_info(tmp_path, "plain", features), {"train": [{"picture": photo(0), "kind": 1}]})
    found = read_tfds("plain", data_dir=tmp_path)
    assert found.classes == ("0", "1")
    assert found.labels.tolist() == [1]


def test_damaged_and_missing_files(tmp_path):
    info = make_info(tmp_path, "kitchen", {"image": IMAGE, "label": LABEL})
    noise = np.random.default_rng(0).bytes(20_000)
    write(info, {"train": [{"image": photo(1) + noise, "label": 1}] * 6})
    file = tmp_path / "kitchen/1.0.0/kitchen-train.array_record-00001"
    data = bytearray(file.read_bytes())
    data[data.index(noise[:20])] ^= 1
    file.write_bytes(data)
    with pytest.raises(DatasetError, match=r"array_record-00001, record 0: cannot be read: .* prepare the"):
        read_tfds("kitchen", data_dir=tmp_path)
    file.unlink()
    with pytest.raises(DatasetError, match="array_record-00001 is missing: copy or prepare it again"):
        read_tfds("kitchen", data_dir=tmp_path)
    assert len(read_tfds("kitchen", split="train[:4]", data_dir=tmp_path)) == 4
    (tmp_path / "kitchen/1.0.0/features.json").write_text("{")
    with pytest.raises(DatasetError, match="kitchen cannot be read"):
        read_tfds("kitchen", data_dir=tmp_path)
