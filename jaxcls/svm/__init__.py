"""Frozen features and a linear SVM become a classifier."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcls.svm import cross_validation, fit, labels, solver
