"""What training left in the folder of a run, for tests to compare."""

import jax
import numpy as np


def newest(run_dir):
    """The folder of the newest checkpoint."""
    return max(path for path in (run_dir / "checkpoints").iterdir() if path.name.isdecimal())


def read_arrays(run_dir):
    """All arrays of the newest checkpoint, as Orbax itself finds them."""
    from orbax.checkpoint import v1 as ocp

    return ocp.load(newest(run_dir) / "arrays")


def assert_same(actual, expected):
    """Compare two trees of arrays, bit for bit."""
    found, wanted = (dict(jax.tree.leaves_with_path(tree)) for tree in (actual, expected))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(found[path], value, err_msg=jax.tree_util.keystr(path))
