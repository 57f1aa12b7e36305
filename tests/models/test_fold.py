"""The folded network against the unfolded one, and folded kernels against torch's."""

import csv
import os
from functools import partial

import jax
import numpy as np
import pytest

from jaxcls.models import architecture as architectures
from jaxcls.models import fold
from jaxcls.models.architecture import ARCHITECTURES, Architecture, abstract_variables
from jaxcls.models.fold import _in_parts, apply_folded, fitting_at_once, fold_batch_norm
from jaxcls.models.port import read_state_dict, to_variables
from jaxcls.models.resnet import make_apply
from jaxcls.preprocess import Preprocess

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
DEEP = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "resnet101", "resnet152")]


def draw_variables(architecture):
    """Random kernels, and batch norm whose every value matters; the activations keep their size."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:3])
            return generator.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))
        low, high = {"scale": (0.3, 0.9), "var": (0.5, 1.5)}.get(name, (-0.5, 0.5))
        return generator.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree.map_with_path(draw, abstract_variables(architecture))


def difference(actual, expected):
    """The largest, relative to the largest expected value."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", *DEEP])
def test_folded_features_are_the_unfolded_networks(architecture):
    variables = draw_variables(architecture)
    pixels = np.random.default_rng(1).standard_normal((2, 64, 64, 3), np.float32)
    expected, _ = jit(make_apply(architecture), static_argnums=2)(variables, pixels, False)
    features = jit(apply_folded)(fold_batch_norm(variables), pixels)
    assert (features.dtype, features.shape) == (np.float32, (2, ARCHITECTURES[architecture].num_features))
    assert difference(features, expected) < 1e-5


@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
@pytest.mark.parametrize("num_at_once", [1, 2])
def test_a_few_images_at_once_give_the_same_features(dtype, num_at_once):
    """Six images: by stages 1, 2, 3 and 6 at once, or 2, 3, 6 and 6."""
    weights = fold_batch_norm(draw_variables("resnet18"), dtype)
    pixels = np.random.default_rng(1).standard_normal((6, 32, 32, 3), np.float32)
    few = jit(apply_folded, static_argnums=2)(weights, pixels, num_at_once)
    assert difference(few, jit(apply_folded)(weights, pixels)) < 1e-6


@pytest.mark.parametrize(
    ("num_images", "size", "expected"),
    [(6, 4, 3), (64, 16, 16), (5, 8, 5), (61, 16, 61), (61, 4, 1), (7, 1, 1)],
)
def test_a_batch_is_divided_into_parts_near_the_size_wanted(num_images, size, expected):
    sizes = []

    def stage(x):
        sizes.append(len(x))
        return 2 * x

    x = np.arange(num_images, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(_in_parts(stage, x, size), 2 * x)
    assert set(sizes) == {expected}


def test_as_many_images_at_once_as_suit_the_threads(monkeypatch):
    monkeypatch.setenv("PJRT_NPROC", "3")
    assert [fitting_at_once(size) for size in (32, 128, 224, 500)] == [147, 9, 3, 3]
    monkeypatch.delenv("PJRT_NPROC")
    assert fitting_at_once(224) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_biases_made_bfloat16_change_no_features(monkeypatch, bottleneck):
    """Where kernels stay float32. Those that shortcuts pass on are no bfloat16s."""
    name = "two_bottlenecks" if bottleneck else "two_basics"  # each is remembered by its name
    monkeypatch.setattr(architectures, "ARCHITECTURES", {name: Architecture((2, 2, 2, 2), bottleneck)})
    variables = draw_variables(name)
    pixels = np.random.default_rng(1).standard_normal((2, 32, 32, 3), np.float32)
    expected = fold_batch_norm(variables)
    stem, stages = fold._fold_blocks(variables)
    fold._make_biases_bfloat16(stem, stages)
    weights = fold._stacked(stem, stages, np.float32)
    assert difference(jit(apply_folded)(weights, pixels), jit(apply_folded)(expected, pixels)) < 1e-5

    kept = {"conv3", "shortcut_conv"} if bottleneck else {"conv2", "shortcut_conv", "conv"}
    for path, leaf in jax.tree.leaves_with_path(fold_batch_norm(variables, jax.numpy.bfloat16)):
        name, kind = (key.key for key in path[-2:])
        if kind == "bias":
            exact = np.array_equal(leaf, leaf.astype(jax.numpy.bfloat16).astype(np.float32))
            assert exact == (name not in kept), jax.tree_util.keystr(path)


def test_a_bias_that_bfloat16_holds_or_cannot_hold_scales_nothing():
    convolution = {"kernel": np.ones((1, 1, 1, 4), np.float32), "bias": np.array([0.0, 1e-60, 1.0, 1e60])}
    reader = {"kernel": np.ones((1, 1, 4, 1), np.float32), "bias": np.zeros(1)}
    with np.errstate(over="ignore"):
        fold._make_bias_bfloat16(convolution, [reader])
    np.testing.assert_array_equal(convolution["bias"], [0, 0, 1, np.inf])
    assert (convolution["kernel"] == 1).all()
    assert (reader["kernel"] == 1).all()


def test_bfloat16_is_multiplied_where_the_platform_does_it_well(monkeypatch):
    """On CPU all but the stem are products, of bfloat16; accelerators keep their convolutions, unrolled."""
    monkeypatch.setattr(architectures, "ARCHITECTURES", {"threes": Architecture((3, 3, 3, 3), False)})
    weights = fold_batch_norm(draw_variables("threes"), jax.numpy.bfloat16)
    traced = jax.jit(apply_folded).trace(weights, np.zeros((2, 32, 32, 3), np.float32))
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda")}
    products = [line for line in text["cpu"].splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(line.count("xbf16>") == 2 for line in products)
    assert text["cpu"].count("stablehlo.convolution") == 1
    assert "stablehlo.dot_general" not in text["cuda"]
    assert text["cuda"].count("stablehlo.convolution") == 20  # blocks that are alike are one function
    assert "stablehlo.while" in text["cpu"]
    assert "stablehlo.while" not in text["cuda"]
    assert "bitcast_convert" not in text["cuda"]


def test_kernels_and_biases_are_torchs():
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    variables = draw_variables("resnet18")
    params, statistics = (variables[name]["stage2"]["block2"] for name in ("params", "batch_stats"))
    conv, norm = torch.nn.Conv2d(128, 128, 3, bias=False), torch.nn.BatchNorm2d(128)
    conv.weight.data = torch.from_numpy(params["conv1"]["kernel"].transpose(3, 2, 0, 1).copy())
    for name, value in (("weight", params["norm1"]["scale"]), ("bias", params["norm1"]["bias"])):
        getattr(norm, name).data = torch.from_numpy(value)
    norm.running_mean, norm.running_var = map(
        torch.from_numpy, (statistics["norm1"]["mean"], statistics["norm1"]["var"])
    )
    expected = fuse_conv_bn_eval(conv.double().eval(), norm.double().eval())

    folded = fold_batch_norm(variables)["stage2"]["rest"]["conv1"]
    kernel, bias = folded["kernel"][0], folded["bias"][0]
    assert kernel.dtype == bias.dtype == np.float32
    weight = expected.weight.detach().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_allclose(kernel, weight, rtol=1e-7, atol=0)  # rounded once
    np.testing.assert_allclose(bias, expected.bias.detach().numpy(), rtol=1e-7, atol=0)


def test_kernels_take_the_dtype_asked_for_and_biases_stay_float32():
    folded = fold_batch_norm(draw_variables("resnet18"), jax.numpy.bfloat16)
    for path, leaf in jax.tree.leaves_with_path(folded):
        assert leaf.dtype == (np.float32 if path[-1].key == "bias" else jax.numpy.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_scores_of_photos_are_the_unfolded_float32_networks(shared, weights, architecture):
    """50 ImageNet photos: every prediction the same, and each photo's logits within 2 % in norm."""
    from jaxcls.data.dataset import from_items

    folder = shared / "data" / "imagenet50"
    with (folder / "labels.csv").open(newline="") as file:
        dataset = from_items([folder / row["file"] for row in csv.DictReader(file)])
    preprocess = Preprocess()
    images = np.stack([preprocess.resize_and_crop(dataset.image(i)) for i in range(len(dataset))])
    ported = to_variables(architecture, read_state_dict(weights / f"{architecture}.safetensors"))
    kernel, bias = ported.head

    def logits(function, *arguments):
        batches = np.split(preprocess.normalize(images), 2)
        return np.concatenate([function(*arguments, batch) for batch in batches]) @ kernel + bias

    unfolded = make_apply(architecture)
    expected = logits(jax.jit(lambda tree, pixels: unfolded(tree, pixels, False)[0]), ported.variables)
    for dtype, allowed in ((np.float32, 1e-5), (jax.numpy.bfloat16, 0.02)):
        folded = fold_batch_norm(ported.variables, dtype)
        actual = logits(jax.jit(apply_folded), folded)
        np.testing.assert_array_equal(actual.argmax(axis=1), expected.argmax(axis=1))
        errors = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert errors.max() < allowed
