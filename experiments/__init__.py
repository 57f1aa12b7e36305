"""Experiments on photos: each `python -m experiments.NAME` from the repository's root."""
