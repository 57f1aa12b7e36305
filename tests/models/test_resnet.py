"""The network against torch: activations, training mode, frozen parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxcls.errors import UsageError
from jaxcls.models import architecture as architectures
from jaxcls.models import resnet
from jaxcls.models.architecture import ARCHITECTURES, Architecture, abstract_variables
from jaxcls.models.normalized_product import normalize_product
from jaxcls.models.port import from_variables, to_variables
from jaxcls.models.resnet import (
    ResNet,
    frozen_param_mask,
    init_variables,
    make_apply,
)

# Compiling takes most of these tests' time, running next to none of it.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def draw_pixels(batch=2, size=64):
    return np.random.default_rng(0).standard_normal((batch, size, size, 3), np.float32)


def to_nchw(pixels):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def assert_close(actual, expected, relative):
    """Compare with the largest expected value: single values near zero carry the rounding of large ones."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@pytest.mark.parametrize(
    ("architecture", "num_params"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameter_count_with_a_1000_class_head(architecture, num_params):
    trunk = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(architecture)["params"]))
    assert trunk + (ARCHITECTURES[architecture].num_features + 1) * 1000 == num_params


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_abstract_variables_are_what_the_network_initialises(architecture):
    network = ResNet(ARCHITECTURES[architecture])
    expected = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), draw_pixels())
    assert abstract_variables(architecture) == expected


# The deep ones repeat the same blocks; the parameter counts above already tell their depths apart.
DEEP = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet101", "resnet152")]


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50", *DEEP])
def test_every_stage_agrees_with_transformers(architecture):
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    pytest.importorskip("transformers", reason="transformers is the oracle")
    import torch_oracle

    torch.manual_seed(0)
    network = torch_oracle.make_transformers(architecture)
    pixels = draw_pixels()
    with torch.no_grad():
        output = network(to_nchw(pixels), output_hidden_states=True)
    ported = to_variables(architecture, torch_oracle.state_of(network))

    @jit
    def activations(variables, pixels):
        features, state = ResNet(ARCHITECTURES[architecture]).apply(
            variables,
            pixels,
            train=False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name in STAGES,
        )
        return features, [state["intermediates"][stage]["__call__"][0] for stage in STAGES]

    features, stages = activations(ported.variables, pixels)
    for actual, expected in zip(stages, output.hidden_states, strict=True):
        assert_close(actual, expected.permute(0, 2, 3, 1), relative=1e-4)
    kernel, bias = ported.head
    assert_close(features @ kernel + bias.reshape(1, -1), output.logits, relative=1e-4)

    # The same weights under torchvision's names, in a network written with them.
    other = torch_oracle.TorchvisionResNet(architecture, num_classes=len(bias)).eval()
    state = from_variables(architecture, ported.variables, ported.head, "torchvision")
    other.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    with torch.no_grad():
        assert_close(other(to_nchw(pixels)), output.logits, relative=1e-5)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
@pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
def test_training_mode_agrees_with_torch(monkeypatch, bottleneck, batch_norm):
    """Logits, gradients and statistics, from one step on the batch's own statistics or the stored ones.

    In float64: in float32 the gradients of these random networks differ by a tenth between torch and torch.
    """
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    pytest.importorskip("transformers", reason="the oracle's module imports it")
    import torch_oracle

    architecture = "shallow_bottleneck" if bottleneck else "shallow_basic"
    monkeypatch.setattr(
        architectures, "ARCHITECTURES", {architecture: Architecture((2, 1, 1, 1), bottleneck)}
    )
    torch.manual_seed(0)
    network = torch_oracle.make_torchvision(architecture)
    before = torch_oracle.state_of(network)
    pixels = draw_pixels()
    weights = np.random.default_rng(1).standard_normal((2, 10))

    num_values = {}  # that each batch norm averages over
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: num_values.update(
                    {name: inputs[0].numel() / module.num_features}
                )
            )
    network.double().train(batch_norm == "train")
    logits = network(to_nchw(pixels).double())
    (logits * torch.from_numpy(weights)).sum().backward()
    after = torch_oracle.state_of(network)
    for name, count in num_values.items() if batch_norm == "train" else ():  # torch's variance is unbiased
        old = 0.9 * before[f"{name}.running_var"]
        new = after[f"{name}.running_var"]
        after[f"{name}.running_var"] = old + (new - old) * (count - 1) / count
    gradients = {name: parameter.grad.numpy() for name, parameter in network.named_parameters()}
    expected = to_variables(architecture, after | gradients)

    def loss(params, head, batch_stats):
        apply = make_apply(architecture, dtype=jnp.float64, batch_norm=batch_norm)
        features, new_stats = apply({"params": params, "batch_stats": batch_stats}, pixels, train=True)
        actual = features @ head[0] + head[1].reshape(1, -1)
        return (actual * weights).sum(), (actual, new_stats)

    with jax.enable_x64(True):
        ported = to_variables(architecture, before)
        variables, head = jax.tree.map(np.float64, (ported.variables, ported.head))
        step = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (params, head), (actual, stats) = step(variables["params"], head, variables["batch_stats"])

    assert_close(actual, logits.detach(), relative=1e-6)
    actual = flatten_dict({"params": params, "batch_stats": stats})
    for path, value in flatten_dict(expected.variables).items():
        assert_close(actual[path], value, relative=1e-5)
    for value, gradient in zip(head, expected.head, strict=True):
        assert_close(value, gradient, relative=1e-5)


@pytest.mark.parametrize(("architecture", "number"), [("resnet18", 0), ("resnet50", 17)])
def test_widening_convolutions_are_normalised_without_their_output(monkeypatch, architecture, number):
    """The last one of every bottleneck, and the first shortcut."""
    calls = []

    def count(*operands, **options):
        calls.append(operands)
        return normalize_product(*operands, **options)

    monkeypatch.setattr(resnet, "normalize_product", count)
    apply = partial(make_apply(architecture), train=True)
    jax.eval_shape(apply, abstract_variables(architecture), draw_pixels())
    assert len(calls) == number


@pytest.fixture(scope="module")
def variables():
    """Of a network of one block a stage, called shallow, with statistics unlike any batch's."""
    shallow = Architecture((1, 1, 1, 1), bottleneck=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architectures, "ARCHITECTURES", {**ARCHITECTURES, "shallow": shallow})
        drawn = init_variables("shallow", jax.random.key(0))
        stats = jax.tree.map(lambda leaf: leaf - np.float32(0.25), drawn["batch_stats"])
        yield {"params": drawn["params"], "batch_stats": stats}


def gradients_and_stats(apply, variables, pixels):
    @jit
    def step(params):
        def loss(params):
            features, stats = apply({**variables, "params": params}, pixels, train=True)
            return (features**2).mean(), (features, stats)

        return jax.grad(loss, has_aux=True)(params)

    return step(variables["params"])


def changed(new, old):
    """{top-level name: whether its leaves differ}; either all of them do or none."""
    verdicts = {}
    for name, tree in new.items():
        leaves = [
            not np.array_equal(leaf, other)
            for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(old[name]), strict=True)
        ]
        assert all(leaves) or not any(leaves), name
        verdicts[name] = all(leaves)
    return verdicts


@pytest.mark.parametrize("num_frozen", [0, 1, 4])
def test_frozen_stages_keep_their_statistics_and_have_no_gradient(variables, num_frozen):
    apply = make_apply("shallow", num_frozen_stages=num_frozen)
    gradients, (_, stats) = gradients_and_stats(apply, variables, draw_pixels(size=32))
    trained = {name: index > num_frozen or num_frozen == 0 for index, name in enumerate(STAGES)}
    assert changed(stats, variables["batch_stats"]) == trained
    assert changed(gradients, jax.tree.map(np.zeros_like, gradients)) == trained
    mask = frozen_param_mask(variables["params"], num_frozen)
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])
    assert {name: not all(jax.tree.leaves(tree)) for name, tree in mask.items()} == trained
    assert {name: not any(jax.tree.leaves(tree)) for name, tree in mask.items()} == trained


def test_frozen_batch_norm_trains_on_the_stored_statistics(variables):
    pixels = draw_pixels(size=32)
    apply = make_apply("shallow", batch_norm="frozen")
    gradients, (features, stats) = gradients_and_stats(apply, variables, pixels)
    assert not any(changed(stats, variables["batch_stats"]).values())
    assert all(changed(gradients, jax.tree.map(np.zeros_like, gradients)).values())
    expected, _ = jit(apply, static_argnames="train")(variables, pixels, train=False)
    assert_close(features, expected, relative=1e-5)


def test_evaluation_returns_the_statistics_unchanged(variables):
    apply = make_apply("shallow")

    def evaluate(variables, pixels):
        _, stats = apply(variables, pixels, train=False)
        assert stats is variables["batch_stats"]
        return stats

    stats = jax.eval_shape(evaluate, variables, draw_pixels(size=32))
    assert jax.tree.structure(stats) == jax.tree.structure(variables["batch_stats"])


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outside(variables):
    pixels = draw_pixels(size=64)

    def run(dtype):
        apply = make_apply("shallow", dtype=dtype)
        return jit(apply, static_argnames="train")(variables, pixels, train=True)

    features, stats = run(jnp.bfloat16)
    assert features.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {np.dtype(np.float32)}
    exact, _ = run(jnp.float32)
    error = np.abs(features - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1


def test_initial_kernels_are_he_normal_over_the_fan_out():
    params = init_variables("resnet50", jax.random.key(3))["params"]
    kernel = params["stage4"]["block1"]["conv2"]["kernel"]
    assert kernel.shape == (3, 3, 512, 512)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (3 * 3 * 512)), rtol=0.01)
    np.testing.assert_allclose((np.abs(kernel) < kernel.std()).mean(), 0.6827, atol=0.005)
    assert (params["stage4"]["block1"]["norm3"]["scale"] == 1).all()
    again = init_variables("resnet50", jax.random.key(3))["params"]
    other = init_variables("resnet50", jax.random.key(4))["params"]
    assert np.array_equal(kernel, again["stage4"]["block1"]["conv2"]["kernel"])
    assert not np.array_equal(kernel, other["stage4"]["block1"]["conv2"]["kernel"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_apply("resnet19"), "resnet19.*resnet18"),
        (lambda: make_apply("resnet18", batch_norm="eval"), "'eval'.*'frozen'"),
        (lambda: make_apply("resnet18", num_frozen_stages=5), "5.*0.*4"),
        (lambda: frozen_param_mask({}, -1), "-1"),
        (lambda: init_variables("vgg", jax.random.key(0)), "vgg"),
    ],
)
def test_impossible_options_are_usage_errors(call, message):
    with pytest.raises(UsageError, match=message):
        call()
