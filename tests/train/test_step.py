"""The training and evaluation step on networks small enough to work out by hand."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcls.parallel import batch_sharding, make_mesh, replicated
from jaxcls.preprocess import Preprocess
from jaxcls.train.state import TrainState, init_state
from jaxcls.train.step import (
    block_sizes,
    cross_entropy,
    drop,
    make_eval_step,
    make_train_loop,
    make_train_step,
)

B, D, K = 8, 5, 3
PREPROCESS = Preprocess(size=2)
RATE = 0.5
SGD = optax.sgd(RATE)


def apply_linear(variables, pixels, train):
    """Mean colour times a matrix; the statistics count the calls in training."""
    features = pixels.mean((1, 2)) @ variables["params"]["kernel"]
    return features, {"calls": variables["batch_stats"]["calls"] + train}


def draw_images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (B, 2, 2, 3), np.uint8)


LABELS = np.asarray([0, 1, 2, 0, 1, 2, 2, 2], np.int32)


def draw_params():
    generator = np.random.default_rng(1)
    return {
        "backbone": {"kernel": generator.standard_normal((3, D), np.float32)},
        "head": {
            "kernel": generator.standard_normal((D, K), np.float32),
            "bias": generator.standard_normal(K, np.float32),
        },
    }


def make_state(optimizer, step=0, ema_params=None):
    params = jax.tree.map(jnp.asarray, draw_params())
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=params,
        batch_stats={"calls": jnp.zeros(())},
        opt_state=optimizer.init(params),
        ema_params=ema_params,
        key=jax.random.key(3),
    )


def make_step(apply=apply_linear, num_devices=2, optimizer=SGD, **changes):
    options = {"dropout": 0.0, "label_smoothing": 0.0, "weights": None, "ema_decay": None}
    mesh = make_mesh(B if num_devices == 2 else 1)
    assert mesh.size == num_devices
    return make_train_step(apply, PREPROCESS, optimizer, mesh, **(options | changes))


def features_by_hand():
    pixels = (draw_images() / 255 - np.asarray(PREPROCESS.mean)) / np.asarray(PREPROCESS.std)
    return pixels.mean((1, 2)) @ draw_params()["backbone"]["kernel"]


def logits_by_hand(features):
    head = draw_params()["head"]
    return features @ head["kernel"] + head["bias"]


def losses_by_hand(logits, label_smoothing=0.0):
    targets = np.eye(K)[LABELS] * (1 - label_smoothing) + label_smoothing / K
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -(targets * log_probabilities).sum(1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy(label_smoothing):
    logits = logits_by_hand(features_by_hand())
    losses = cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(LABELS), label_smoothing)
    np.testing.assert_allclose(losses, losses_by_hand(logits, label_smoothing), rtol=1e-5)
    torch = pytest.importorskip("torch")
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits),
        torch.from_numpy(LABELS).long(),
        reduction="none",
        label_smoothing=label_smoothing,
    )
    np.testing.assert_allclose(losses, expected.numpy(), rtol=1e-5)


def test_the_sums_of_a_step():
    state, sums = make_step()(make_state(SGD), draw_images(), LABELS)
    logits = logits_by_hand(features_by_hand())
    np.testing.assert_allclose(sums.loss, losses_by_hand(logits).sum(), rtol=1e-5)
    assert int(sums.num_correct) == (logits.argmax(1) == LABELS).sum()
    assert int(sums.num_seen) == B
    assert int(state.step) == 1
    assert float(state.batch_stats["calls"]) == 1


def test_weighted_loss_is_torchs_weighted_mean():
    weights = np.asarray([1.0, 4.0, 0.25], np.float32)
    _, sums = make_step(weights=weights)(make_state(SGD), draw_images(), LABELS)
    logits = logits_by_hand(features_by_hand())
    by_image = weights[LABELS]
    expected = (losses_by_hand(logits) * by_image).sum() / by_image.sum()
    np.testing.assert_allclose(sums.loss / B, expected, rtol=1e-5)
    torch = pytest.importorskip("torch")
    theirs = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(LABELS).long(), weight=torch.from_numpy(weights).double()
    )
    np.testing.assert_allclose(sums.loss / B, theirs.item(), rtol=1e-5)


@pytest.mark.parametrize("num_parts", [2, 4])
def test_parts_add_up_to_the_batch(num_parts):
    """Weighted by the whole batch's classes, which are not those of each part; without batch norm."""
    weights = np.asarray([1.0, 4.0, 0.25], np.float32)
    whole, sums = make_step(weights=weights)(make_state(SGD), draw_images(), LABELS)
    parts, sums_of_parts = make_step(weights=weights, num_parts=num_parts)(
        make_state(SGD), draw_images(), LABELS
    )
    for one, other in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums_of_parts.loss, sums.loss, rtol=1e-5)
    assert sums_of_parts[1:] == sums[1:]
    assert float(parts.batch_stats["calls"]) == num_parts


def test_a_batch_whose_classes_weigh_nothing_moves_nothing():
    labels = np.zeros(B, np.int32)
    step = make_step(weights=np.asarray([0.0, 1.0, 1.0], np.float32))
    state, sums = step(make_state(SGD), draw_images(), labels)
    assert float(sums.loss) == 0
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(draw_params()), strict=True):
        np.testing.assert_array_equal(new, old)


def test_the_head_moves_against_its_gradient():
    state, _ = make_step(label_smoothing=0.1)(make_state(SGD), draw_images(), LABELS)
    features = features_by_hand()
    logits = logits_by_hand(features)
    targets = np.eye(K)[LABELS] * 0.9 + 0.1 / K
    residual = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - targets) / B
    head = draw_params()["head"]
    np.testing.assert_allclose(state.params["head"]["bias"], head["bias"] - RATE * residual.sum(0), rtol=1e-4)
    np.testing.assert_allclose(
        state.params["head"]["kernel"], head["kernel"] - RATE * features.T @ residual, rtol=1e-4, atol=1e-6
    )


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    features = jnp.full((200, 500), 3.0)
    dropped = np.asarray(drop(jax.random.key(0), features, 0.2))
    zeros = dropped == 0
    np.testing.assert_allclose(dropped[~zeros], 3 / 0.8, rtol=1e-6)
    # 100,000 draws: the share's standard deviation is 0.0013.
    assert zeros.mean() == pytest.approx(0.2, abs=0.005)
    assert dropped.mean() == pytest.approx(3, abs=0.02)
    assert drop(jax.random.key(0), features, 0.0) is features


@pytest.mark.parametrize("number", [0, 7])
def test_a_step_draws_from_its_key_folded_with_its_number(number):
    step = make_step(dropout=0.5)
    _, sums = step(make_state(SGD, step=number), draw_images(), LABELS)
    kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), number), 0.5, (B, D))
    logits = logits_by_hand(np.where(kept, 2 * features_by_hand(), 0))
    np.testing.assert_allclose(sums.loss / B, losses_by_hand(logits).mean(), rtol=1e-5)


def test_the_average_of_the_parameters_by_hand():
    step = make_step(ema_decay=0.75)
    state = make_state(SGD, ema_params=jax.tree.map(jnp.asarray, draw_params()))
    expected = draw_params()["head"]["bias"]
    for seed in range(3):
        state, _ = step(state, draw_images(seed), LABELS)
        expected = 0.75 * expected + 0.25 * np.asarray(state.params["head"]["bias"])
    np.testing.assert_allclose(state.ema_params["head"]["bias"], expected, rtol=1e-5)
    assert state.best_params is state.ema_params


def test_without_an_average_the_parameters_are_the_best():
    state = make_state(SGD)
    assert state.best_params is state.params


def test_the_state_is_donated():
    state = make_state(SGD)
    new, _ = make_step(num_devices=1)(state, draw_images(), LABELS)
    assert state.params["head"]["kernel"].is_deleted()
    assert not new.params["head"]["kernel"].is_deleted()


@pytest.mark.parametrize("num_steps", [3, 4])
def test_a_loop_of_steps_is_the_steps_one_by_one(num_steps):
    optimizer = optax.sgd(RATE, momentum=0.9)
    images = np.stack([draw_images(seed) for seed in range(4)])
    labels = np.stack([np.roll(LABELS, shift) for shift in range(4)])
    states = [make_state(optimizer, ema_params=jax.tree.map(jnp.asarray, draw_params())) for _ in range(2)]
    step = make_step(optimizer=optimizer, dropout=0.5, ema_decay=0.75)
    loop = make_train_loop(step, make_mesh(B))
    state, sums = loop(states[0], images, labels, num_steps)
    one_by_one, expected = states[1], []
    for i in range(num_steps):
        one_by_one, one = step(one_by_one, images[i], labels[i])
        expected.append(one)
    assert int(state.step) == num_steps
    for name, values in sums._asdict().items():
        assert values.shape == (4,)
        np.testing.assert_allclose(values[:num_steps], [getattr(one, name) for one in expected], rtol=1e-6)
        assert not values[num_steps:].any()
    state, one_by_one = (replace(s, key=jax.random.key_data(s.key)) for s in (state, one_by_one))
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)


def test_a_loop_compiles_once_for_any_number_of_steps_and_donates_its_state():
    mesh, num_compiled = make_mesh(B), 0

    def count(event, duration, **kwargs):
        nonlocal num_compiled
        num_compiled += event == "/jax/core/compile/backend_compile_duration"

    loop = make_train_loop(make_step(), mesh)
    images, labels = np.stack([draw_images()] * 3), np.stack([LABELS] * 3)
    state = first = jax.device_put(make_state(SGD), replicated(mesh))
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for num_steps in (3, 1, 2):
            state, _ = loop(state, images, labels, num_steps)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert num_compiled == 1
    assert int(state.step) == 6
    assert first.params["head"]["kernel"].is_deleted()


@pytest.mark.parametrize(
    ("steps_per_epoch", "log_every", "first_step", "expected"),
    [
        (23, 10, 0, [10, 10, 3, 10, 10, 3]),
        (23, 25, 0, [10, 10, 3, 10]),
        (30, 25, 0, [10, 10, 5, 5, 10]),
        (4, 1, 0, [1, 1, 1, 1, 1]),
        (23, 10, 33, [10, 3, 10]),
        (23, 10, 25, [8, 10, 3, 10]),
    ],
)
def test_blocks_of_steps_end_with_epochs_and_logged_steps(steps_per_epoch, log_every, first_step, expected):
    assert list(islice(block_sizes(steps_per_epoch, log_every, first_step), len(expected))) == expected


def test_training_leaves_the_backbone_as_it_was():
    kernel = jnp.ones((3, D))
    trunk = SimpleNamespace(
        variables={"params": {"kernel": kernel}, "batch_stats": {"calls": jnp.zeros(())}}, num_features=D
    )
    state = init_state(trunk, K, SGD, seed=0, use_ema=True)
    assert state.params["head"]["kernel"].shape == (D, K)
    make_step(num_devices=1, optimizer=SGD, ema_decay=0.5)(state, draw_images(), LABELS)
    np.testing.assert_array_equal(kernel, np.ones((3, D)))


class NormNet(nn.Module):
    @nn.compact
    def __call__(self, pixels, train):
        x = nn.Conv(16, (2, 2), name="conv")(pixels)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.relu(x).mean((1, 2))


def test_two_devices_train_as_one():
    """Each device holds other colours: statistics of its half alone would differ."""
    net = NormNet()
    images = draw_images()
    images[: B // 2] //= 4
    variables = net.init(jax.random.key(0), PREPROCESS.normalize(images), train=True)

    def apply(variables, pixels, train):
        features, updates = net.apply(variables, pixels, train, mutable=["batch_stats"] if train else [])
        return features, updates["batch_stats"] if train else variables["batch_stats"]

    trunk = SimpleNamespace(variables=variables, num_features=16)
    losses, states = {}, {}
    for num_devices in (1, 2):
        state = init_state(trunk, K, SGD, seed=0, use_ema=False)
        step = make_step(apply, num_devices)
        losses[num_devices] = []
        for _ in range(3):
            state, sums = step(state, images, LABELS)
            losses[num_devices].append(float(sums.loss))
        states[num_devices] = jax.device_get((state.params, state.batch_stats))
    assert losses[2][0] != losses[2][2]
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-5)
    for two, one in zip(*map(jax.tree.leaves, (states[2], states[1])), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-6)


def test_masked_rows_count_for_nothing_whatever_they_hold():
    mesh = make_mesh(B)
    step = make_eval_step(apply_linear, PREPROCESS, mesh)
    mask = np.asarray([True, True, False, True, True, False, False, True])
    results = []
    for seed, label in ((5, -1), (6, 2), (7, 99)):
        images = np.where(mask[:, None, None, None], draw_images(), draw_images(seed))
        labels = np.where(mask, LABELS, label).astype(np.int32)
        placed = jax.device_put((images, labels, mask), batch_sharding(mesh))
        results.append(jax.device_get(step(draw_params(), {"calls": jnp.zeros(())}, *placed)))
    logits = logits_by_hand(features_by_hand())
    np.testing.assert_allclose(results[0].loss, losses_by_hand(logits)[mask].sum(), rtol=1e-5)
    assert results[0].num_correct == (logits.argmax(1) == LABELS)[mask].sum()
    assert results[0].num_seen == mask.sum()
    assert results[0] == results[1] == results[2]


def test_evaluation_uses_the_stored_statistics_and_no_dropout():
    """`apply` gets train=False: the counting statistics would show in another result."""
    seen = []

    def apply(variables, pixels, train):
        seen.append(train)
        return apply_linear(variables, pixels, train)

    mesh = make_mesh(1)
    mask = np.ones(B, bool)
    make_eval_step(apply, PREPROCESS, mesh)(
        draw_params(), {"calls": jnp.zeros(())}, draw_images(), LABELS, mask
    )
    assert seen == [False]
