"""Device augmentation: each function against an independent one, each operation's draws by their law."""

import colorsys
import inspect
import math
from dataclasses import FrozenInstanceError, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from jaxcls.augment import host, ops
from jaxcls.errors import UsageError
from jaxcls.parallel import batch_sharding, make_mesh

SHAPE = (6, 10, 12, 3)

OPERATIONS = [
    ops.Fliplr(0.5),
    ops.Flipud(0.5),
    ops.Crop(percent=(0, 0.3)),
    ops.RandomResizedCrop(size=7, min_area=0.3),
    ops.Affine((0.7, 1.4), (-0.2, 0.2), rotate=(-45, 45), shear=(-16, 16), cval=(10, 128, 250)),
    ops.ColourJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), hue=(-40, 40)),
    ops.Grayscale(alpha=(0, 1)),
    ops.GaussianBlur(sigma=(0, 3)),
    ops.AdditiveGaussianNoise(scale=(0, 50)),
    ops.Cutout(nb_iterations=2, size=(0.1, 0.6)),
    ops.Sometimes(0.5, ops.Grayscale()),
    ops.Sequential([ops.Fliplr(0.5), ops.RandomResizedCrop(8), ops.Crop(0.1)]),
    ops.Sequential([ops.Fliplr(0.5), ops.Affine(translate_percent=(0, 0.5))], random_order=True),
]
SIZES = {OPERATIONS[3]: (7, 7), OPERATIONS[11]: (8, 8)}
MIXES = [ops.MixUp(alpha=1.0), ops.CutMix()]
FUNCTIONS = [
    ops.fliplr,
    ops.flipud,
    ops.crop_and_resize,
    ops.affine,
    ops.turn_hue,
    ops.gaussian_blur,
    ops.cutout,
]

jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
all_operations = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: type(o).__name__)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def distance(images, others):
    return np.abs(np.asarray(images).astype(int) - np.asarray(others)).max()


def as_mix(operation):
    """An operation of (key, images) that shows the targets too, in a last column of pixels."""

    def mixed(key, images):
        labels = jnp.arange(len(images)) % 3
        return operation(key, images, labels, 3)

    return mixed


def drawn(monkeypatch, name, operation, shape):
    """The values that an operation draws for images of a shape, by the function that they are for."""

    def draw(key, images):
        seen = []
        monkeypatch.setattr(ops, name, lambda images, *values, **options: seen.append(values) or images)
        operation(key, images)
        return seen[0]

    return [np.asarray(value) for value in jit(draw)(jax.random.key(0), jnp.zeros(shape, jnp.uint8))]


# Conventions


def test_the_tables_name_all_that_is_public():
    public = {
        name: value
        for name, value in vars(ops).items()
        if getattr(value, "__module__", "") == ops.__name__ and not name.startswith("_")
    }
    named = {type(o).__name__ for o in OPERATIONS + MIXES} | {f.__name__ for f in FUNCTIONS}
    assert set(public) == named | {"parse"}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_take_images_first_and_no_key(function):
    parameters = inspect.signature(function).parameters.values()
    assert next(iter(parameters)).name == "images"
    for parameter in parameters:
        assert parameter.name != "key"
        assert parameter.default is parameter.empty or parameter.kind is parameter.KEYWORD_ONLY


@all_operations
def test_operations_take_key_and_images_and_are_frozen_values(operation):
    assert list(inspect.signature(operation).parameters) == ["key", "images"]
    twin = type(operation)(**{f.name: getattr(operation, f.name) for f in fields(operation)})
    assert (operation, hash(operation)) == (twin, hash(twin))
    with pytest.raises(FrozenInstanceError):
        operation.p = 1


FORMS = {
    "vmap": lambda operation: jit(jax.vmap(operation)),
    "plain": lambda operation: (
        lambda keys, images: jax.tree.map(lambda *results: jnp.stack(results), *map(operation, keys, images))
    ),
}


@all_operations
def test_operations_give_uint8_images(operation):
    for num in (1, 6):
        images = jax.ShapeDtypeStruct((num, *SHAPE[1:]), jnp.uint8)
        result = jax.eval_shape(operation, jax.random.key(0), images)
        assert (result.dtype, result.shape) == (np.uint8, (num, *SIZES.get(operation, SHAPE[1:3]), 3))


@pytest.mark.parametrize("form", ["vmap", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "operation",
    [
        ops.Sequential([ops.Fliplr(0.5), ops.Crop((0, 0.3)), ops.Cutout(size=(0.1, 0.6))]),
        *(pytest.param(operation, marks=pytest.mark.slow) for operation in OPERATIONS),
        *(pytest.param(as_mix(operation), marks=pytest.mark.slow) for operation in MIXES),
    ],
    ids=lambda o: getattr(type(o), "__name__", "mix"),
)
def test_plain_jitted_and_mapped_agree(operation, form):
    """Also: one key, one result; other keys and other examples, other draws."""
    keys, images = jax.random.split(jax.random.key(1), 2), jnp.asarray(noise(*SHAPE))
    if isinstance(operation, ops._Operation):
        images = jnp.broadcast_to(images[:1], SHAPE)  # only the draws tell examples apart
    jitted = jit(operation)
    results = [jitted(key, images) for key in keys]
    others = FORMS[form](operation)(keys, jnp.stack([images, images]))
    for first, again, second, both in zip(
        *map(jax.tree.leaves, (results[0], jitted(keys[0], images), results[1], others)), strict=True
    ):
        np.testing.assert_array_equal(first, again, strict=True)
        for one, other in zip((first, second), both, strict=True):
            assert one.dtype == other.dtype
            # Fused arithmetic may round a half to the other side.
            gap = np.abs(np.asarray(one, float) - np.asarray(other, float))
            assert gap.max() <= 1
            assert (gap > 1e-5).mean() < 0.02
    first, second = (jax.tree.leaves(result)[0] for result in results)
    assert len({np.asarray(image).tobytes() for image in first}) > 1
    assert (first != second).any()


def test_a_sharded_batch_gives_the_same():
    operation = ops.Sequential([ops.Fliplr(0.5), ops.Affine(rotate=(-45, 45))])
    images, key = noise(*SHAPE), jax.random.key(3)
    sharded = jax.device_put(images, batch_sharding(make_mesh(len(images))))
    assert distance(jit(operation)(key, sharded), jit(operation)(key, images)) <= 1


# Functions against independent ones


def test_flips_mirror_those_that_are_chosen():
    images, flipped = noise(*SHAPE), np.asarray([True, False, True, True, False, False])
    np.testing.assert_array_equal(ops.fliplr(images, flipped)[2], images[2, :, ::-1], strict=True)
    np.testing.assert_array_equal(ops.flipud(images, flipped)[3], images[3, ::-1], strict=True)
    for function in (ops.fliplr, ops.flipud):
        np.testing.assert_array_equal(function(images, flipped)[~flipped], images[~flipped], strict=True)


@pytest.mark.parametrize("size", [(10, 12), (5, 3), (23, 40), (1, 1)])
def test_crop_and_resize_is_pillows(size):
    images = noise(*SHAPE)
    boxes = np.asarray(
        [
            [0, 0, 12, 10],
            [1, 2, 9, 8],
            [0.3, 0.7, 5.9, 3.2],
            [11, 9, 12, 10],
            [3.5, 0, 4, 10],
            [0, 4, 12, 4.4],
        ],
        np.float32,
    )
    resized = jit(ops.crop_and_resize, static_argnums=2)(images, boxes, size)
    assert resized.dtype == np.uint8
    for image, box, result in zip(images, boxes, resized, strict=True):
        expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, box=box.tolist())
        assert distance(result, np.asarray(expected)) <= 1  # Pillow rounds between its two passes


@pytest.mark.parametrize("cval", [0, 128, (250, 3, 77)])
def test_affine_is_scipys(cval):
    images, generator = noise(*SHAPE), np.random.default_rng(1)
    matrices = np.eye(2, 3)[None] + generator.normal(0, [[0.3, 0.3, 3]], (6, 2, 3))
    matrices = matrices.astype(np.float32)
    matrices[0] = np.eye(2, 3)
    matrices[1, :, 2] = 1000
    sampled = jit(ops.affine, static_argnames="cval")(images, matrices, cval=cval)
    for image, matrix, result in zip(images, matrices.astype(float), sampled, strict=True):
        # SciPy counts (row, column), with the centre of the first pixel at 0.
        linear, offset = matrix[::-1, 1::-1], matrix[::-1, 2]
        offset = offset + linear @ [0.5, 0.5] - 0.5
        for channel, fill in enumerate(np.broadcast_to(cval, 3)):
            pixels = image[..., channel].astype(float)
            expected = ndimage.affine_transform(
                pixels, linear, offset, order=1, mode="grid-constant", cval=fill
            )
            np.testing.assert_allclose(result[..., channel], expected, atol=0.51)
    np.testing.assert_array_equal(sampled[0], images[0])
    np.testing.assert_array_equal(sampled[1], np.broadcast_to(np.uint8(cval), SHAPE[1:]))


def test_affine_takes_pillows_matrices():
    images = noise(1, 40, 50, 3)
    matrix = [[0.8, 0.2, 3.3], [-0.15, 0.9, 5.1]]
    sampled = jit(ops.affine)(images, jnp.asarray([matrix]))
    expected = Image.fromarray(images[0]).transform(
        (50, 40), Image.Transform.AFFINE, (*matrix[0], *matrix[1]), Image.Resampling.BILINEAR
    )
    assert distance(sampled[0, 5:-5, 5:-5], np.asarray(expected)[5:-5, 5:-5]) <= 1


def test_colours_are_hand_worked():
    # Luma 0.299 R + 0.587 G + 0.114 B of (100, 100, 100) and (200, 0, 100): 100 and 71.2, mean 85.6.
    images = np.tile(np.asarray([[[100, 100, 100], [200, 0, 100]]], np.uint8), (3, 1, 1, 1))
    factors = np.asarray([[0.5, 1, 1], [1, 0.5, 1], [1, 1, 0.5]], np.float32)
    expected = [
        [[50, 50, 50], [100, 0, 50]],
        [[93, 93, 93], [143, 43, 93]],
        [[100, 100, 100], [136, 36, 86]],
    ]
    np.testing.assert_array_equal(jit(host.adjust_colour)(images, factors)[:, 0], expected)


def test_hue_is_that_of_hsv():
    images = noise(*SHAPE)
    images[0, 0] = images[0, 0, :, :1]  # greys, of no hue
    images[0, 1, 0], images[0, 1, 1] = 0, 255
    degrees = np.asarray([90, -30, 0, 180, 725, -400], np.float32)
    turned = np.asarray(jit(ops.turn_hue)(images, degrees))
    for image, angle, result in zip(images, degrees, turned, strict=True):
        for pixel, other in zip(image.reshape(-1, 3), result.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
            expected = colorsys.hsv_to_rgb((hue + angle / 360) % 1, saturation, value)
            np.testing.assert_allclose(other, 255 * np.asarray(expected), atol=0.51)
    np.testing.assert_array_equal(turned[2], images[2], strict=True)


def test_blur_is_scipys():
    images, sigma = noise(*SHAPE), np.asarray([0, 0.4, 1, 2.5, 7, 100], np.float32)
    blurred = jit(ops.gaussian_blur)(images, sigma)
    for image, width, result in zip(images, sigma, blurred, strict=True):
        if width:
            options = {"sigma": (width, width, 0), "mode": "constant", "radius": (12, 12, 0)}
            total = ndimage.gaussian_filter(np.ones(image.shape), **options)
            image = ndimage.gaussian_filter(image.astype(float), **options) / total
        np.testing.assert_allclose(result, image, atol=0.51)


@pytest.mark.parametrize("cval", [0, (250, 3, 77)])
def test_cutout_fills_the_pixels_whose_centres_lie_in_a_box(cval):
    images = noise(2, 4, 5, 3)
    boxes = np.asarray([[[1.2, 0.6, 2.6, 2.4], [4, 3, 9, 9]], [[-9, -9, 0.4, 9], [1, 1, 1.4, 4]]], np.float32)
    expected = images.copy()
    expected[0, 1, 1:3] = cval  # rows 1, at 1.5; columns 1 and 2, at 1.5 and 2.5
    expected[0, 3, 4] = cval
    np.testing.assert_array_equal(ops.cutout(images, boxes, cval=cval), expected, strict=True)


# Operations: what they draw


def uniform(values, low, high):
    """Whether values look drawn uniformly from [low, high] (Kolmogorov and Smirnov)."""
    assert low - 1e-5 <= values.min()
    assert values.max() <= high + 1e-5
    return stats.kstest(values.ravel(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", [ops.Fliplr, ops.Flipud])
@pytest.mark.parametrize("p", [0, 0.2, 1])
def test_flips_have_their_probability(monkeypatch, kind, p):
    (flipped,) = drawn(monkeypatch, kind.__name__.lower(), kind(p), (1000, 1, 1, 3))
    assert flipped.dtype == bool
    assert abs(flipped.sum() - 1000 * p) <= 4 * math.sqrt(1000 * p * (1 - p))  # four standard deviations


def test_sometimes_has_its_probability():
    images = jnp.full((1000, 1, 1, 3), 7, jnp.uint8)
    changed = jit(ops.Sometimes(0.3, lambda key, images: 255 - images))(jax.random.key(0), images)
    assert set(np.unique(changed)) == {7, 248}
    assert abs((changed[:, 0, 0, 0] == 248).sum() - 300) < 4 * math.sqrt(210)


def test_crop_cuts_each_side_on_its_own(monkeypatch):
    boxes, size = drawn(monkeypatch, "crop_and_resize", ops.Crop((0.1, 0.3)), (1000, 10, 20, 3))
    assert tuple(size) == (10, 20)
    cut = np.abs(boxes / [20, 10, 20, 10] - [0, 0, 1, 1])
    assert all(uniform(side, 0.1, 0.3) for side in cut.T)
    assert np.abs(np.corrcoef(cut.T) - np.eye(4)).max() < 0.15
    boxes, _ = drawn(monkeypatch, "crop_and_resize", ops.Crop(0.25), (2, 8, 4, 3))
    np.testing.assert_allclose(boxes, [[1, 2, 3, 6]] * 2)


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 8)])
@pytest.mark.parametrize("min_area", [0.1])
def test_random_boxes_follow_the_hosts_law(monkeypatch, height, width, min_area):
    operation = ops.RandomResizedCrop(9, min_area=min_area)
    boxes, size = drawn(monkeypatch, "crop_and_resize", operation, (2000, height, width, 3))
    assert tuple(size) == (9, 9)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    draws = np.random.default_rng(0).random((2000, 4))
    expected = host.draw_boxes(draws, np.asarray([[height, width]] * 2000), min_area)

    def facts(boxes):
        left, top, right, bottom = boxes.T
        area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
        return np.stack([left, top, area / (height * width), ratio]).round(4)

    for ours, theirs in zip(facts(boxes), facts(expected), strict=True):
        assert stats.ks_2samp(ours, theirs, method="asymp").pvalue > 1e-3


def test_affine_composes_its_matrix(monkeypatch):
    operation = ops.Affine(scale=1.3, translate_percent=0.1, rotate=30, shear=10)
    (matrices,) = drawn(monkeypatch, "affine", operation, (2, 10, 20, 3))
    cos, sin, slope = math.cos(math.pi / 6), math.sin(math.pi / 6), math.tan(math.pi / 18)
    there = np.asarray([[1, 0, -10], [0, 1, -5], [0, 0, 1]])
    turn = np.asarray([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])  # y points down: clockwise
    grow, lean = np.diag([1.3, 1.3, 1]), np.asarray([[1, -slope, 0], [0, 1, 0], [0, 0, 1]])
    back = np.asarray([[1, 0, 10 + 2], [0, 1, 5 + 1], [0, 0, 1]])
    expected = np.linalg.inv(back @ lean @ grow @ turn @ there)[:2]
    np.testing.assert_allclose(matrices, [expected] * 2, atol=1e-5)


def test_affine_is_seen():
    images = noise(2, 8, 8, 3)
    square = np.full_like(images, 200)
    square[:, 2:6, 2:6] = 50
    quarter, move = ops.Affine(rotate=90), ops.Affine(translate_percent=0.25, cval=9)
    operations = [ops.Affine(), quarter, move, ops.Affine(shear=45), ops.Affine(scale=2)]
    batches = [images, images, images, images, square]

    @jit
    def apply_all(key):
        return [
            operation(key, jnp.asarray(each)) for operation, each in zip(operations, batches, strict=True)
        ]

    same, turned, moved, leaning, doubled = map(np.asarray, apply_all(jax.random.key(0)))
    np.testing.assert_array_equal(same, images)
    np.testing.assert_array_equal(turned, np.rot90(images, -1, (1, 2)))
    np.testing.assert_array_equal(moved[:, 2:, 2:], images[:, :-2, :-2])
    assert (moved[:, :2] == 9).all()
    assert (moved[:, :, :2] == 9).all()
    # Row 2 lies 1.5 above the centre: each pixel is the mean of those 1 and 2 to its left.
    mean = images[:, 2, :-2] / 2 + images[:, 2, 1:-1] / 2
    np.testing.assert_allclose(leaning[:, 2, 2:], mean, atol=0.51)
    assert (doubled[:, 1:-1, 1:-1] == 50).all()


def test_affine_draws_from_its_ranges(monkeypatch):
    operation = ops.Affine((0.5, 1.5), (-0.2, 0.1), rotate=(-45, 30), shear=(-16, 16))
    (matrices,) = drawn(monkeypatch, "affine", operation, (1000, 10, 20, 3))
    forward = np.linalg.inv(matrices[:, :, :2].astype(float))
    centre = np.asarray([10, 5])
    shift = np.einsum("nij,nj->ni", forward, centre - matrices[:, :, 2]) - centre
    assert all(uniform(side, -0.2, 0.1) for side in (shift / [20, 10]).T)
    assert uniform(np.sqrt(np.linalg.det(forward)), 0.5, 1.5)
    assert uniform(np.degrees(np.arctan2(forward[:, 1, 0], forward[:, 1, 1])), -45, 30)


def test_colour_jitter_draws_from_its_ranges(monkeypatch):
    operation = ops.ColourJitter((0.5, 0.9), (1, 1.5), (0, 3), hue=(-90, 90))
    (factors,) = drawn(monkeypatch, "adjust_colour", operation, (1000, 1, 1, 3))
    (degrees,) = drawn(monkeypatch, "turn_hue", operation, (1000, 1, 1, 3))
    for values, low, high in zip((*factors.T, degrees), (0.5, 1, 0, -90), (0.9, 1.5, 3, 90), strict=True):
        assert uniform(values, low, high)
    assert np.abs(np.corrcoef([*factors.T, degrees]) - np.eye(4)).max() < 0.15


def test_hue_alone_is_turned():
    red = jnp.full((1, 1, 1, 3), jnp.asarray([200, 50, 50]), jnp.uint8)
    turned = jit(ops.ColourJitter(hue=120))(jax.random.key(0), red)
    assert turned.ravel().tolist() == [50, 200, 50]


def test_grayscale_leaves_the_luma():
    # Luma 71.2 and 100: two pixels, so that less contrast would show.
    images = jnp.asarray([[[[200, 0, 100], [100, 100, 100]]]], jnp.uint8)
    grey, half = jit(lambda key: [ops.Grayscale(alpha)(key, images) for alpha in (1.0, 0.5)])(
        jax.random.key(0)
    )
    assert grey.ravel().tolist() == [71, 71, 71, 100, 100, 100]
    assert half.ravel().tolist() == [136, 36, 86, 100, 100, 100]


def test_blur_draws_from_its_range(monkeypatch):
    (sigma,) = drawn(monkeypatch, "gaussian_blur", ops.GaussianBlur((0.5, 2)), (1000, 1, 1, 3))
    assert uniform(sigma, 0.5, 2)


def test_noise_is_normal_and_alike_in_all_channels():
    noisy = jit(ops.AdditiveGaussianNoise(20))(jax.random.key(0), jnp.full((4, 50, 50, 3), 128, jnp.uint8))
    added = np.asarray(noisy)[..., 0] - 128.0
    assert (np.ptp(noisy, -1) == 0).all()
    assert added.mean() == pytest.approx(0, abs=1)
    assert added.std((1, 2)) == pytest.approx([20] * 4, rel=0.06)
    assert abs(np.corrcoef(added.reshape(4, -1)) - np.eye(4)).max() < 0.1
    spread = jit(ops.AdditiveGaussianNoise((0, 30)))(
        jax.random.key(0), jnp.full((500, 16, 16, 3), 128, jnp.uint8)
    )
    assert np.asarray(spread, float)[..., 0].std((1, 2)).mean() == pytest.approx(15, abs=1.5)


def test_cutout_draws_sizes_and_places(monkeypatch):
    operation = ops.Cutout(3, size=(0.2, 0.6))
    (boxes,) = drawn(monkeypatch, "cutout", operation, (500, 10, 20, 3))
    assert boxes.shape == (500, 3, 4)
    low, high = boxes[..., :2] / [20, 10], boxes[..., 2:] / [20, 10]
    assert all(uniform((high - low)[..., side], 0.2, 0.6) for side in range(2))
    assert all(uniform((high + low)[..., side] / 2, 0, 1) for side in range(2))


@pytest.mark.parametrize("alpha", [0.3])
def test_mixup_blends_images_and_targets_alike(alpha):
    images, labels = noise(1000, 2, 2, 3), np.arange(1000) % 5
    mixed, targets = jit(ops.MixUp(alpha), static_argnums=3)(jax.random.key(0), images, labels, 5)
    assert (targets.dtype, targets.shape) == (np.float32, (1000, 5))
    weights = np.asarray(targets)[np.arange(1000), labels].astype(float)
    np.testing.assert_allclose(targets[np.arange(1000), labels - 1], 1 - weights, atol=1e-6)
    blend = (
        weights[:, None, None, None] * images
        + (1 - weights[:, None, None, None]) * images[np.arange(-1, 999)]
    )
    np.testing.assert_allclose(mixed, blend, atol=0.51)
    assert stats.kstest(weights, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_cutmix_weighs_targets_by_pixels():
    num, height, width = 1000, 20, 30
    numbers = np.arange(num, dtype=np.uint32) % 251
    images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (num, height, width, 3))
    mixed, targets = jit(ops.CutMix(alpha=1.0), static_argnums=3)(
        jax.random.key(0), images, np.arange(num) % 5, 5
    )
    own = (np.asarray(mixed) == images).all(-1)
    np.testing.assert_array_equal(
        np.asarray(mixed)[..., 0], np.where(own, images[..., 0], images[np.arange(-1, num - 1), ..., 0])
    )
    np.testing.assert_allclose(
        np.asarray(targets)[np.arange(num), np.arange(num) % 5], own.mean((1, 2)), atol=1e-6
    )
    np.testing.assert_allclose(np.asarray(targets).sum(1), 1, atol=1e-6)
    rows, columns = ~own.all(2), ~own.all(1)
    np.testing.assert_array_equal(~own, rows[:, :, None] & columns[:, None])  # one rectangle
    # Not cut off: of all those inside, height over width is the picture's.
    inside = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    sides = np.stack([rows.sum(1) / height, columns.sum(1) / width])[:, inside]
    assert np.abs(sides[0] - sides[1]).max() <= 1 / height + 1 / width


def test_cutmix_draws_areas_and_places(monkeypatch):
    def draw(key, images):
        seen = []
        inside = jnp.ones(images.shape[:3], bool)
        monkeypatch.setattr(ops, "_inside", lambda boxes, height, width: seen.append(boxes) or inside)
        ops.CutMix(alpha=0.5)(key, images, jnp.zeros(len(images), int), 2)
        return seen[0]

    boxes = np.asarray(jit(draw)(jax.random.key(0), jnp.zeros((1000, 1, 2, 3), jnp.uint8)))[:, 0]
    low, high = boxes[:, :2] / [2, 1], boxes[:, 2:] / [2, 1]
    assert stats.kstest((high - low).prod(1), stats.beta(0.5, 0.5).cdf).pvalue > 1e-3
    assert all(uniform((high + low)[:, side] / 2, 0, 1) for side in range(2))


# Composition


def test_sequential_applies_in_order():
    images, key = noise(2, 8, 8, 3), jax.random.key(0)

    def brighten(key, images):
        return images.at[:, :4].add(9)

    up = ops.Flipud()
    brightened_first = ops.Sequential([brighten, up])(key, jnp.asarray(images))
    brightened_last = ops.Sequential((ops.Sequential([up]), brighten))(key, jnp.asarray(images))
    images[:, :4] += 9
    np.testing.assert_array_equal(brightened_first, images[:, ::-1])
    images[:, :4] -= 9
    flipped = images[:, ::-1].copy()
    flipped[:, :4] += 9
    np.testing.assert_array_equal(brightened_last, flipped)
    assert hash(ops.Sequential([up])) == hash(ops.Sequential((up,)))


def test_children_draw_from_keys_of_their_own():
    images = jnp.asarray(noise(200, 2, 2, 3))
    twice = jit(ops.Sequential([ops.Fliplr(0.5), ops.Fliplr(0.5)]))(jax.random.key(0), images)
    unchanged = (twice == images).all((1, 2, 3)).sum()
    assert 70 < unchanged < 130  # with one key for both, all 200


def test_random_order_draws_every_order():
    images, key = jnp.asarray(noise(3, 8, 8, 3)), jax.random.key(0)
    move = ops.Affine(translate_percent=0.25)
    augment, moved = jit(ops.Sequential([move, ops.Fliplr()], random_order=True)), jit(move)
    orders = [moved(key, images)[:, :, ::-1], moved(key, images[:, :, ::-1])]
    results = [augment(jax.random.key(seed), images) for seed in range(20)]
    counts = [sum(bool((result == order).all()) for result in results) for order in orders]
    assert sum(counts) == 20
    assert min(counts) >= 3


def test_in_random_order_too_children_draw_from_keys_of_their_own():
    images = jnp.asarray(noise(200, 2, 2, 3))
    twice = jit(ops.Sequential([ops.Fliplr(0.5), ops.Fliplr(0.5)], random_order=True))
    assert 70 < (twice(jax.random.key(0), images) == images).all((1, 2, 3)).sum() < 130


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.Fliplr(1.5), r"p 1.5: must lie in \[0, 1\]"),
        (lambda: ops.Flipud(math.nan), "p nan: must lie in"),
        (lambda: ops.Fliplr((0, 1)), r"p \(0, 1\): give a number"),
        (lambda: ops.Sometimes(-0.1, ops.Fliplr()), "p -0.1"),
        (lambda: ops.Sometimes(0.5, None), "child None: give an operation"),
        (lambda: ops.Crop(0.5), r"percent 0.5: must lie in \[0, 0.5\)"),
        (lambda: ops.Crop((0, 0.1, 0.2)), r"percent \(0, 0.1, 0.2\): give a number or a tuple \(low, high\)"),
        (lambda: ops.Crop([0, 0.1]), r"percent \[0, 0.1\]: give a number or a tuple"),
        (lambda: ops.Crop((0.2, 0.1)), r"percent \(0.2, 0.1\): the lower end comes first"),
        (lambda: ops.RandomResizedCrop(0), "size 0: must lie in"),
        (lambda: ops.RandomResizedCrop(2.5), "size 2.5: give an integer"),
        (lambda: ops.RandomResizedCrop(8, min_area=0), r"min_area 0: must lie in \(0, 1\]"),
        (lambda: ops.Affine(scale=(0, 1)), r"scale \(0, 1\): must lie in \(0, inf\)"),
        (lambda: ops.Affine(translate_percent=10), "translate_percent 10"),
        (lambda: ops.Affine(rotate="45"), "rotate '45': give a number or a tuple"),
        (lambda: ops.Affine(rotate=math.inf), "rotate inf: must lie in"),
        (lambda: ops.Affine(shear=90), "shear 90: must lie in"),
        (lambda: ops.Affine(cval=256), r"cval 256: must lie in \[0, 255\]"),
        (lambda: ops.Affine(cval=(0, 255)), r"cval \(0, 255\): give a grey level or a colour"),
        (lambda: ops.ColourJitter(contrast=-1), "contrast -1"),
        (lambda: ops.Grayscale(1.1), "alpha 1.1"),
        (lambda: ops.GaussianBlur(-1), "sigma -1"),
        (lambda: ops.AdditiveGaussianNoise((-5, 5)), r"scale \(-5, 5\)"),
        (lambda: ops.Cutout(0), "nb_iterations 0"),
        (lambda: ops.Cutout(size=0), "size 0: must lie in"),
        (lambda: ops.MixUp(0), "alpha 0"),
        (lambda: ops.CutMix((1, 1)), r"alpha \(1, 1\): give a number"),
        (lambda: ops.Sequential([]), "give one operation or more"),
        (lambda: ops.Sequential([ops.Fliplr(), "flip"]), "give one operation or more"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    "images", [np.zeros(SHAPE, np.float32), np.zeros(SHAPE[1:], np.uint8), np.zeros((2, 3, 4, 4), np.uint8)]
)
def test_other_images_are_refused(images):
    for call in (
        lambda: ops.Fliplr()(jax.random.key(0), images),
        lambda: ops.MixUp()(jax.random.key(0), images, jnp.zeros(len(images), int), 2),
    ):
        with pytest.raises(UsageError, match=r"must be uint8 \[B, H, W, 3\]"):
            call()


@pytest.mark.parametrize(
    "labels", [np.zeros(6, np.float32), np.zeros((6, 2), np.int32), np.zeros(5, np.int32)]
)
def test_other_labels_are_refused(labels):
    with pytest.raises(UsageError, match=r"must be int32 \[6\]"):
        ops.CutMix()(jax.random.key(0), noise(*SHAPE), labels, 2)


def test_where_the_shape_has_to_stay_it_does():
    resize = ops.RandomResizedCrop(4)
    for operation in (ops.Sometimes(0.5, resize), ops.Sequential([resize, ops.Fliplr()], random_order=True)):
        with pytest.raises(UsageError, match="where the shape has to stay"):
            jax.eval_shape(operation, jax.random.key(0), jnp.asarray(noise(*SHAPE)))


# Text


@all_operations
def test_what_an_operation_prints_is_read_again(operation):
    assert ops.parse(repr(operation)) == operation


def test_text_is_read_as_python_would_read_it():
    text = "Sequential([Fliplr(0.5), Crop(percent=(0, 0.1)),\n Affine(rotate=(-45, 45), cval=[1, 2, 3][0])])"
    with pytest.raises(UsageError, match="is no number"):
        ops.parse(text)
    text = text.replace("[1, 2, 3][0]", "(1, 2, 3)")
    assert ops.parse(f" {text} ") == eval(text, vars(ops))
    assert set(ops.OPERATIONS.values()) == {type(operation) for operation in OPERATIONS}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "invalid syntax"),
        ("Fliplr(0.5", "was never closed"),
        ("Fliplr(0.5); Fliplr(0.5)", "invalid syntax"),
        ("Fliplr", "'Fliplr' is no number, tuple, list or operation"),
        ("5", "give an operation, such as"),
        ("[Fliplr()]", "give an operation, such as"),
        ("Flip(0.5)", r"'Flip\(0.5\)' is no number, tuple, list or operation \(known are Sequential, "),
        ("MixUp()", "'MixUp.*known are"),
        ("__import__('os').system('true')", "known are"),
        ("Fliplr(__import__('os'))", "known are"),
        ("ops.Fliplr(0.5)", "known are"),
        ("Fliplr('0.5')", "'0.5'\" is no number"),
        ("Fliplr(*[0.5])", "known are"),
        ("Fliplr(**{'p': 0.5})", "known are"),
        ("Fliplr(0.5 if 1 else 0)", "known are"),
        ("Fliplr(0.5 + 0)", "known are"),
        ("Fliplr(p=0.5, p=1)", "Fliplr: an option is given twice"),
        ("Fliplr(q=1)", "Fliplr: got an unexpected keyword argument 'q'"),
        ("Crop()", "Crop: missing 1 required positional argument: 'percent'"),
        ("Crop(0.6)", "percent 0.6: must lie in"),
        ("Sequential(5)", "Sequential: 'int' object is not iterable"),
        ("Sequential([5])", "give one operation or more"),
        ("Fliplr(1j)", "is no number"),
        ("Fliplr(0.5)\0", "null bytes"),
        ("(" * 5000, "nested"),
        ("-" * 9000 + "1", "nested too deeply"),
        ("[" * 150 + "]" * 150, "give an operation"),
        ("9" * 9000, "digits"),
        ("Fliplr(" + "1" * 20_000 + ")", "20,008 characters, of 10,000 at most"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        ops.parse(text)
    assert len(str(caught.value)) < 700
    assert str(caught.value).startswith("pipeline ")
