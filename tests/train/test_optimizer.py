"""The optimizer against NumPy by hand, torch and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcls.errors import UsageError
from jaxcls.models.resnet import init_variables
from jaxcls.train.config import FinetuneConfig
from jaxcls.train.optimizer import (
    cosine_schedule,
    decayed_mask,
    make_optimizer,
    make_schedule,
    per_epoch_schedule,
    trainable_mask,
    unit_gain_sgd,
)

RATE, MOMENTUM, L2 = 0.3, 0.9, 0.05
NUM_STEPS = 5


def draw(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "kernel": generator.standard_normal((3, 2), np.float32),
        "bias": generator.standard_normal(2, np.float32),
    }


GRADIENTS = [draw(seed) for seed in range(1, NUM_STEPS + 1)]


def optimize(optimizer, params, gradients=GRADIENTS):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def all_of(params):
    return jax.tree.map(lambda _: True, params)


def make_sgd(**changes):
    options = {"momentum": MOMENTUM, "l2": L2, "trainable": all_of}
    return unit_gain_sgd(**({"schedule": optax.constant_schedule(RATE)} | options | changes))


def clipped(gradient, largest):
    norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
    return {name: value * min(1, largest / norm) for name, value in gradient.items()}


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_unit_gain_sgd_by_hand(clip_norm):
    expected, velocity = draw(), {"kernel": 0.0, "bias": 0.0}
    for gradient in GRADIENTS:
        if clip_norm is not None:
            gradient = clipped(gradient, clip_norm)
        for name, l2 in (("kernel", L2), ("bias", 0.0)):
            velocity[name] = MOMENTUM * velocity[name] + (1 - MOMENTUM) * (
                gradient[name] + l2 * expected[name]
            )
            expected[name] = expected[name] - RATE * velocity[name]
    actual = optimize(make_sgd(clip_norm=clip_norm), draw())
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5)


def test_a_gradient_within_the_norm_is_not_clipped():
    params = draw()
    unclipped = optimize(make_sgd(), params)
    for name, value in optimize(make_sgd(clip_norm=100.0), params).items():
        np.testing.assert_array_equal(value, unclipped[name])


def test_unit_gain_sgd_is_torchs_with_a_rate_times_one_minus_momentum():
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in draw().items()}
    groups = [
        {"params": [params["kernel"]], "weight_decay": L2},
        {"params": [params["bias"]], "weight_decay": 0.0},
    ]
    sgd = torch.optim.SGD(groups, lr=RATE * (1 - MOMENTUM), momentum=MOMENTUM)
    for gradient in GRADIENTS:
        for name, value in gradient.items():
            params[name].grad = torch.from_numpy(value)
        sgd.step()
    for name, value in optimize(make_sgd(), draw()).items():
        np.testing.assert_allclose(value, params[name].detach().numpy(), rtol=1e-5)


def test_the_rate_follows_the_schedule():
    params = draw()
    no_momentum = make_sgd(schedule=per_epoch_schedule((0.5, 0.0), 1), momentum=0.0, l2=0.0)
    actual = optimize(no_momentum, params)
    np.testing.assert_allclose(actual["bias"], params["bias"] - 0.5 * GRADIENTS[0]["bias"], rtol=1e-6)


def test_frozen_parameters_do_not_move_and_hold_no_state():
    params = {"moves": draw(), "stays": draw(1)}
    trainable = {"moves": {"kernel": True, "bias": True}, "stays": {"kernel": False, "bias": False}}
    optimizer = make_sgd(trainable=lambda _: trainable, clip_norm=1.0)
    moved = optimize(optimizer, params, [{"moves": gradient, "stays": gradient} for gradient in GRADIENTS])
    # The frozen gradient does not enter the clipped norm either.
    alone = optimize(make_sgd(clip_norm=1.0), draw())
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(moved["stays"][name], params["stays"][name])
        np.testing.assert_allclose(moved["moves"][name], alone[name], rtol=1e-6)
    arrays = [leaf for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.ndim]
    assert sorted(leaf.shape for leaf in arrays) == [(2,), (3, 2)]  # one velocity for each that moves


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan")])
def test_momentum_outside_0_to_1_is_refused(momentum):
    with pytest.raises(UsageError, match="momentum"):
        make_sgd(momentum=momentum)


def test_per_epoch_schedule_holds_each_rate_for_an_epoch_and_the_last_for_ever():
    schedule = per_epoch_schedule((0.5, 0.2, 0.1), steps_per_epoch=3)
    rates = [float(schedule(step)) for step in (0, 2, 3, 5, 6, 8, 9, 1000)]
    np.testing.assert_allclose(rates, [0.5, 0.5, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1])


def test_cosine_schedule_at_its_ends():
    schedule = cosine_schedule(0.4, num_steps=110, num_warmup_steps=10)
    rates = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [0.0, 0.2, 0.4, 0.2, 0.0], atol=1e-7)


def test_cosine_schedule_without_warm_up_starts_at_the_peak():
    assert float(cosine_schedule(0.4, num_steps=10, num_warmup_steps=0)(0)) == pytest.approx(0.4)


def test_the_schedule_of_a_configuration():
    per_epoch = make_schedule(FinetuneConfig(learning_rates=(0.5, 0.1)), steps_per_epoch=4)
    assert [float(per_epoch(step)) for step in (3, 4)] == pytest.approx([0.5, 0.1])
    config = FinetuneConfig(num_epochs=4, learning_rates=(0.2,), schedule="cosine", warmup_epochs=0.5)
    cosine = make_schedule(config, steps_per_epoch=10)
    assert [float(cosine(step)) for step in (0, 5, 40)] == pytest.approx([0.0, 0.2, 0.0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: per_epoch_schedule((), 3),
        lambda: per_epoch_schedule((0.1, -0.1), 3),
        lambda: cosine_schedule(0.1, num_steps=3, num_warmup_steps=3),
        lambda: cosine_schedule(0.1, num_steps=3, num_warmup_steps=-1),
    ],
)
def test_schedules_that_cannot_work_are_refused(make):
    with pytest.raises(UsageError):
        make()


@pytest.fixture(scope="module")
def params():
    backbone = init_variables("resnet18", jax.random.key(0))["params"]
    return {"backbone": backbone, "head": {"kernel": np.zeros((512, 2)), "bias": np.zeros(2)}}


def moving_names(params, **options):
    mask = trainable_mask(params, **options)
    return {jax.tree_util.keystr(path) for path, moves in jax.tree.leaves_with_path(mask) if moves}


@pytest.mark.parametrize(
    ("num_frozen_stages", "frozen"),
    [(0, ()), (1, ("stem", "stage1")), (2, ("stem", "stage1", "stage2")), (4, ("stem", "stage"))],
)
def test_frozen_stages_stay_and_the_head_moves(params, num_frozen_stages, frozen):
    names = moving_names(params, num_frozen_stages=num_frozen_stages, freeze_norm=False)
    everything = {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)}
    prefixes = tuple(f"['backbone']['{part}" for part in frozen)
    assert names == {name for name in everything if not name.startswith(prefixes)}


def test_frozen_norm_keeps_scale_and_shift_of_the_trunk_only(params):
    names = moving_names(params, num_frozen_stages=0, freeze_norm=True)
    assert "['head']['bias']" in names
    assert {name for name in names if "backbone" in name} == {
        name
        for name in moving_names(params, num_frozen_stages=0, freeze_norm=False)
        if "backbone" in name and name.endswith("['kernel']")
    }


def test_only_kernels_decay(params):
    for path, decays in jax.tree.leaves_with_path(decayed_mask(params)):
        assert decays == (path[-1].key == "kernel")


def test_frozen_batch_norm_clips_the_gradient_at_1():
    params = {"backbone": {"stem": {"kernel": jnp.zeros((2, 2))}}, "head": draw()}
    gradient = jax.tree.map(lambda value: jnp.full(value.shape, 100.0), params)
    norms = {}
    for batch_norm in ("train", "frozen"):
        config = FinetuneConfig(momentum=0.0, l2=0.0, batch_norm=batch_norm)
        optimizer = make_optimizer(config, optax.constant_schedule(1.0))
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        norms[batch_norm] = float(optax.tree.norm(updates))
    assert norms == pytest.approx({"train": 100 * np.sqrt(12), "frozen": 1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 0),
        ("learning_rates", ()),
        ("learning_rates", (0.1, -0.1)),
        ("learning_rates", (float("nan"),)),
        ("schedule", "linear"),
        ("warmup_epochs", -1.0),
        ("momentum", 1.0),
        ("batch_size", 0),
        ("dropout", 1.0),
        ("l2", -0.1),
        ("freeze", 5),
        ("freeze", "stem"),
        ("batch_norm", "none"),
        ("label_smoothing", 1.0),
        ("min_crop_area", 0.0),
        ("colour_jitter", 1.0),
        ("precision", "float16"),
        ("ema_decay", 1.0),
        ("seed", -1),
        ("num_workers", -1),
        ("max_bad_fraction", 1.5),
        ("log_every", 0),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        FinetuneConfig(**{name: value})
