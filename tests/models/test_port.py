"""State dicts to variables and back; weights files of any quality."""

import os
import pickle
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxcls.errors import MissingExtraError, UsageError, WeightsError
from jaxcls.models.port import from_variables, read_state_dict, to_variables
from jaxcls.models.resnet import init_variables, make_apply


def draw_head(num_features, num_classes=7):
    generator = np.random.default_rng(5)
    kernel = generator.standard_normal((num_features, num_classes), np.float32)
    return kernel, generator.standard_normal(num_classes, np.float32)


@pytest.fixture(scope="module")
def variables():
    return init_variables("resnet18", jax.random.key(0))


@pytest.fixture(scope="module")
def state(variables):
    """A ResNet-18 with seven classes under torchvision's names."""
    return from_variables("resnet18", variables, draw_head(512))


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("layout", ["torchvision", "timm", "transformers"])
@pytest.mark.parametrize(("architecture", "num_features"), [("resnet34", 512), ("resnet50", 2048)])
def test_round_trip_is_exact(architecture, num_features, layout):
    variables = init_variables(architecture, jax.random.key(1))
    head = draw_head(num_features)
    ported = to_variables(architecture, from_variables(architecture, variables, head, layout))
    assert_equal_trees((ported.variables, ported.head), (variables, head))
    headless = to_variables(architecture, from_variables(architecture, variables, None, layout))
    assert headless.head is None
    assert_equal_trees(headless.variables, variables)


@pytest.mark.parametrize("layout", ["torchvision", "transformers"])
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_names_and_shapes_are_those_of_the_torch_networks(architecture, layout):
    pytest.importorskip("torch", reason="torch is the oracle")
    pytest.importorskip("transformers", reason="transformers is the oracle")
    import torch_oracle

    make = torch_oracle.make_transformers if layout == "transformers" else torch_oracle.make_torchvision
    expected = torch_oracle.state_of(make(architecture))
    ported = to_variables(architecture, expected)
    written = from_variables(architecture, ported.variables, ported.head, layout)
    assert_equal_trees(
        written, {name: value for name, value in expected.items() if "num_batches_tracked" not in name}
    )
    assert all(value.flags.c_contiguous for value in written.values())


def test_wrappers_prefixes_are_taken_off(state, variables):
    wrapped = {f"module.{name}": value for name, value in state.items()}
    wrapped["module.bn1.num_batches_tracked"] = np.int64(3)
    assert_equal_trees(to_variables("resnet18", wrapped).variables, variables)
    bare = from_variables("resnet18", variables, None, "transformers")
    bare = {name.removeprefix("resnet."): value for name, value in bare.items()}
    assert "embedder.embedder.convolution.weight" in bare
    assert_equal_trees(to_variables("resnet18", bare).variables, variables)


def test_a_mismatch_lists_every_difference(state):
    wrong = dict(state)
    del wrong["layer2.0.downsample.1.running_mean"]
    wrong["layer5.0.conv1.weight"] = np.zeros((1, 2), np.float32)
    wrong["conv1.weight"] = np.zeros((64, 1, 7, 7), np.float32)
    with pytest.raises(WeightsError) as caught:
        to_variables("resnet18", wrong)
    summary, *lines = str(caught.value).splitlines()
    assert "resnet18" in summary
    assert "fit no ResNet" in summary
    assert lines == [
        "  + conv1.weight [64, 1, 7, 7]",
        "  - conv1.weight [64, 3, 7, 7]",
        "  - layer2.0.downsample.1.running_mean [128]",
        "  + layer5.0.conv1.weight [1, 2]",
    ]


def test_half_a_head_is_a_mismatch(state):
    del (wrong := dict(state))["fc.bias"]
    with pytest.raises(WeightsError, match=r"  - fc\.bias \[7\]$"):
        to_variables("resnet18", wrong)


def test_weights_of_another_depth_are_named(state):
    with pytest.raises(WeightsError, match=r"not of resnet50: these are weights of resnet18: ") as caught:
        to_variables("resnet50", state)
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].endswith("more differences")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv1.weight", np.full((64, 3, 7, 7), np.nan, np.float32)),
        ("fc.bias", np.full(7, 1e300)),
        ("bn1.running_var", np.full(64, -1, np.float32)),
        ("layer1.0.bn1.weight", np.ones(64, np.int8)),
    ],
)
def test_values_that_no_weight_has_are_refused(state, name, value):
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        to_variables("resnet18", state | {name: value})


def test_from_variables_checks_what_it_writes(variables):
    with pytest.raises(WeightsError, match="resnet50"):
        from_variables("resnet50", variables, None)
    with pytest.raises(WeightsError, match="resnet18"):
        from_variables("resnet18", variables, draw_head(256))
    with pytest.raises(UsageError, match=r"keras.*timm"):
        from_variables("resnet18", variables, None, "keras")
    with pytest.raises(UsageError, match="resnet7"):
        to_variables("resnet7", {})


# Files


def test_safetensors_of_every_float_become_float32(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the bfloat16 tensors")
    from safetensors.torch import save_file as save_torch_file

    tensors = {
        str(dtype): torch.tensor([[1.5, -2.0, 0.0078125]], dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    save_torch_file({**tensors, "count": torch.tensor(7)}, tmp_path / "w.safetensors")
    state = read_state_dict(tmp_path / "w.safetensors")
    assert state.pop("count") == 7
    for value in state.values():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, [[1.5, -2.0, 0.0078125]])


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_torch_files(tmp_path, suffix, is_zip, key):
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
    state = {
        "a": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "b": torch.ones(2, dtype=torch.bfloat16),
        "bn1.num_batches_tracked": torch.tensor(3),
    }
    saved = state if key is None else {key: state, "epoch": 3}
    torch.save(saved, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=is_zip)
    read = read_state_dict(tmp_path / f"w{suffix}")
    np.testing.assert_array_equal(read["a"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(read["b"], np.ones(2, np.float32))
    assert read["b"].dtype == np.float32
    assert read["bn1.num_batches_tracked"] == 3


def header(text):
    return len(text).to_bytes(8, "little") + text


BAD_SAFETENSORS = {
    "empty": b"",
    "noise": bytes(range(256)),
    "huge header": (1 << 62).to_bytes(8, "little") + b"{}",
    "not json": header(b"[1, 2"),
    "beyond the end": header(b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}')
    + b"\0" * 8,
    "wrong shape": header(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}') + b"\0" * 8,
    "overflowing shape": header(
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}' + b" " * 3
    )
    + b"\0" * 8,
    "endless shape": header(
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 100) + b'],"data_offsets":[0,4]}}'
    )
    + b"\0" * 4,
    "unreadable dtype": header(b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}') + b"\0" * 4,
    "integers": header(b'{"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}') + b"\0" * 4,
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("content", BAD_SAFETENSORS.values(), ids=BAD_SAFETENSORS)
def test_bad_safetensors_are_refused(tmp_path, content):
    (path := tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.safetensors: not a whole safetensors file") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_refused_wherever_they_end(tmp_path):
    save_file({"a": np.ones((20, 10), np.float32)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "part.safetensors").write_bytes(content[:length])
        with pytest.raises(WeightsError):
            read_state_dict(tmp_path / "part.safetensors")


class RunsOnLoad:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bad_torch_files(folder):
    """{what is wrong: file}."""
    import torch

    contents = {
        "code": {"a": RunsOnLoad(folder / "ran")},
        "list": [torch.ones(2)],
        "number": {"a": torch.ones(2), "epoch": 3},
        "expanded": {"a": torch.ones(1).expand(1 << 20, 1 << 20)},
        "sparse": {"a": torch.eye(3).to_sparse()},
        "meta": {"a": torch.ones(2, device="meta")},
    }
    files = {
        kind: folder / f"{kind}.pth" for kind in (*contents, "truncated", "noise", "compressed", "empty")
    }
    for kind, content in contents.items():
        torch.save(content, files[kind])
    torch.save({"a": torch.ones(1000)}, folder / "good.pth")
    good = (folder / "good.pth").read_bytes()
    files["truncated"].write_bytes(good[: len(good) // 2])
    files["noise"].write_bytes(bytes(range(256)) * 4)
    files["empty"].write_bytes(b"")
    with (
        zipfile.ZipFile(folder / "good.pth") as source,
        zipfile.ZipFile(files["compressed"], "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return files


def test_bad_torch_files_are_refused(tmp_path):
    pytest.importorskip("torch", reason="reading .pth files needs torch")
    for kind, path in write_bad_torch_files(tmp_path).items():
        with pytest.raises(WeightsError, match=rf"{kind}\.pth: not a whole file of plain") as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)
        # Refused before torch unpacks it, to whatever size.
        assert ("compressed)" in str(caught.value)) == (kind == "compressed")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_not_there_or_not_weights(tmp_path):
    with pytest.raises(WeightsError, match=r"gone\.safetensors: there is no such file"):
        read_state_dict(tmp_path / "gone.safetensors")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match=r"folder\.pth: there is no such file"):
        read_state_dict(tmp_path / "folder.pth")
    with pytest.raises(WeightsError, match=r"w\.h5: .*\.safetensors, \.pth, \.pt"):
        read_state_dict(tmp_path / "w.h5")


def test_a_file_too_large_for_any_resnet_is_not_read(tmp_path):
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.truncate(5 << 30)  # sparse: takes no space
    with pytest.raises(WeightsError, match="larger than 4 GiB"):
        read_state_dict(tmp_path / "w.safetensors")


def test_without_torch_a_pth_file_names_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"torch.*pip install 'jaxcls\[peers\]'"):
        read_state_dict(tmp_path / "w.pth")


# Real weights


@pytest.fixture(scope="session")
def real_weights(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    subprocess.run([sys.executable, shared / "tools" / "unpack_weights.py", folder], check=True)
    return folder


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_real_weights_give_the_reference_features_and_logits(shared, real_weights, architecture):
    state = read_state_dict(real_weights / f"{architecture}.safetensors")
    ported = to_variables(architecture, state)
    assert_equal_trees(from_variables(architecture, ported.variables, ported.head), state)
    pixels = np.load(shared / "fixtures" / "inputs.npz")["images_nhwc"]
    expected = np.load(shared / "fixtures" / f"{architecture}.npz")
    features, _ = jax.jit(make_apply(architecture), static_argnames="train")(
        ported.variables, pixels, train=False
    )
    kernel, bias = ported.head
    np.testing.assert_allclose(features, expected["features"][:4], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        features @ kernel + bias.reshape(1, -1), expected["logits"][:4], rtol=0, atol=1e-3
    )
