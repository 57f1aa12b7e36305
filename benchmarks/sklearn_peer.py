"""scikit-learn's LinearSVC as a subject: its default, which is the primal problem where N > D; or "-dual"."""

from sklearn.svm import LinearSVC

from benchmarks.fitting import C, Fitting, make_features
from benchmarks.timing import Program
from benchmarks.worker import Task

MAX_CLASSES = 10
"""That are fitted. It fits one after another: of more, the first alone is fitted and stands for all."""


def svm(task: Task) -> Program:
    """A fit of `LinearSVC`."""
    features, labels = make_features(task)
    num_fitted = task.num_classes if task.num_classes <= MAX_CLASSES else 1
    return Fitting(
        lambda: LinearSVC(C=C, dual=task.subject.endswith("-dual") or "auto", random_state=0),
        features,
        (labels != 0).astype(int) if num_fitted == 1 else labels,
        share=num_fitted / task.num_classes,
        describe=lambda machine: {"num_steps": int(machine.n_iter_), "num_classes_fitted": num_fitted},
    )
