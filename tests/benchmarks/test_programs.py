"""A program counts only what it did: results that are stale, poisoned or swapped are refused."""

from contextlib import contextmanager

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC

from benchmarks.fitting import C, Fitting, objectives
from benchmarks.jax_programs import JaxTraining
from benchmarks.photos import Reading
from benchmarks.programs import Scoring, random_images
from benchmarks.timing import SubjectError
from benchmarks.worker import Task


def scoring(score, inputs):
    return Scoring(score, inputs, finish=lambda _: None, to_host=np.asarray, images_per_step=2, details={})


def test_scores_count_where_they_belong_to_their_input():
    inputs = [np.asarray([1.0, 2.0]), np.asarray([5.0, 6.0])]
    program = scoring(lambda values: 3 * values, inputs)
    program.run(5)
    assert program.num_executed() == 5
    program.run(2)
    assert program.num_executed() == 7


@pytest.mark.parametrize("stale", [0.0, np.nan, 3.0])
def test_stale_scores_do_not_count(stale):
    inputs = [np.asarray([1.0, 2.0]), np.asarray([5.0, 6.0])]
    honest = [3 * values for values in inputs]
    calls = iter([*honest, *[np.full(2, stale)] * 4])
    program = scoring(lambda _: next(calls), inputs)
    with pytest.raises(SubjectError, match="0 steps were done where 4 were timed"):
        program.time(4)


def test_a_network_that_ignores_its_input_is_refused():
    with pytest.raises(SubjectError, match="two inputs give the same scores"):
        scoring(lambda _: np.ones(2), [np.zeros(2), np.ones(2)])


def training(step):
    return JaxTraining(
        step,
        {"step": np.zeros((), np.int32), "weights": np.ones(3)},
        [(), ()],
        step_of=lambda state: state["step"],
        weights_of=lambda state: state["weights"],
        images_per_step=2,
        details={},
    )


def test_training_counts_by_the_state():
    program = training(lambda s: ({"step": s["step"] + 1, "weights": s["weights"] * 0.9}, np.float32(1)))
    program.run(3)
    assert program.num_executed() == 3


@pytest.mark.parametrize(
    ("factor", "count", "loss", "message"),
    [
        (1.0, 1, 1.0, "the weights are the same"),
        (0.9, 1, np.nan, "the loss is nan"),
        (0.9, 0, 1.0, "0 steps were done where 3 were timed"),
    ],
)
def test_training_that_does_nothing_is_refused(factor, count, loss, message):
    def step(state):
        return {"step": state["step"] + count, "weights": state["weights"] * factor}, np.float32(loss)

    with pytest.raises(SubjectError, match=message):
        training(step).time(3)


def test_a_batch_that_comes_twice_is_refused():
    task = Task("input_pipeline", "jaxcls", batch_size=2, image_size=16)

    def reading(numbers):
        @contextmanager
        def stream():
            yield (random_images(2, 16, number) for number in numbers)

        return Reading(stream, task)

    assert reading(range(100)).time(4) > 0
    with pytest.raises(SubjectError, match="a batch came twice"):
        reading([0] * 100).time(4)


def test_images_differ_and_stay():
    images = random_images(2, 30, 7)
    assert images.shape == (2, 30, 30, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, random_images(2, 30, 7))
    assert np.abs(images.astype(int) - random_images(2, 30, 8)).mean() > 30


def clusters(num_classes=3):
    labels = np.arange(60) % num_classes
    return np.random.default_rng(0).standard_normal((60, 4)) + 2 * np.eye(4)[labels], labels


def fitting(make, **options):
    return Fitting(make, *clusters(), describe=lambda _: {}, **options)


def test_the_objective_by_hand():
    # Two samples at 1 and -1 and weights (0.5, 0): margins of 0.5, slacks of 0.5.
    features, labels = np.array([[1.0], [-1.0]]), np.array([1, 0])
    objective, gap = objectives(np.array([[0.5, 0.0]]), features, labels, np.array([1]))
    assert objective == pytest.approx(0.5 * 0.25 + C * 2 * 0.25)
    # The gradient is 0.5 - 2 C (0.5 + 0.5) for the feature and 0 for the intercept.
    assert gap == pytest.approx(0.5 * (0.5 - 2 * C) ** 2)


def test_fits_count_by_their_objective():
    program = fitting(lambda: LinearSVC(C=C, tol=1e-8), share=0.5)
    assert program.images_per_step == 30
    assert program.details["gap_at_most"] < 1e-6
    program.run(4)
    assert program.num_executed() == 4


def test_the_objectives_bound_holds_far_from_the_minimum():
    features, labels = clusters()
    nothing = np.zeros((3, 5))
    objective, gap = objectives(nothing, features, labels, np.arange(3))
    np.testing.assert_allclose(objective, 60 * C)
    least = np.array(fitting(lambda: LinearSVC(C=C, tol=1e-8)).details["objective"])
    assert (objective - gap <= least).all()


def test_two_classes_are_one_problem():
    features, labels = clusters(2)
    program = Fitting(lambda: LinearSVC(C=C), features, labels, describe=lambda _: {})
    assert len(program.details["objective"]) == 1
    assert program.time(3) > 0


def test_a_fit_from_before_is_refused():
    machine = LinearSVC(C=C)

    class Lazy:
        def fit(self, features, names):
            return machine if hasattr(machine, "coef_") else machine.fit(features, names)

    with pytest.raises(SubjectError, match="0 steps were done where 2 were timed"):
        fitting(Lazy).time(2)


def test_a_fit_that_does_not_converge_is_refused():
    with pytest.raises(ConvergenceWarning):
        fitting(lambda: LinearSVC(C=1e4, max_iter=1, dual=True))
