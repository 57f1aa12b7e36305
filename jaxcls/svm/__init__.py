"""Frozen features and a linear SVM become a classifier."""
