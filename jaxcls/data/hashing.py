"""256-bit hashes, and which of many lie near each other without comparing all pairs.

A bit is the sign of a random projection, so that the share of bits in which two hashes differ is the angle
between what was hashed, over pi (Charikar, "Similarity estimation techniques from rounding algorithms",
2002). Near hashes are found as Manku, Jain and Das Sarma find near-duplicate web pages (2007): in several
tables, each sorted after another permutation of the bits, near hashes stand close together. Only neighbours
in a table are compared, so that the work grows as N log N however alike the N hashes are.
"""

import numpy as np

NUM_BITS = 256
NUM_TABLES = 16
WINDOW = 8
"""How many entries of a table a hash is compared with."""
NUM_NEIGHBOURS = 8
"""How many near hashes are kept for each."""


def hash_signs(values: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Hash vectors by their directions.

    Args:
        values: float32 [N, D], centred.
        seed: of the projections; hashes compare only under one seed.

    Returns:
        uint64 [N, 4].
    """
    projections = np.random.default_rng(seed).standard_normal((values.shape[1], NUM_BITS), np.float32)
    return np.packbits(values @ projections > 0, axis=1).view(np.uint64)


def near_pairs(hashes: np.ndarray, queries: np.ndarray, *, max_distance: int, seed: int = 0) -> np.ndarray:
    """Pairs of positions whose hashes are near, nearly all of them.

    Args:
        hashes: uint64 [N, 4].
        queries: uint64 [V, N, 4]: hashes of V views of each item, each looked up among `hashes`.
        max_distance: in bits.
        seed: of the permutations.

    Returns:
        int64 [P, 2], each pair once, its smaller position first; at most V x `NUM_NEIGHBOURS` for each item.
    """
    generator = np.random.default_rng(seed)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    found = []
    for view in queries:
        view_bits = np.unpackbits(np.ascontiguousarray(view).view(np.uint8), axis=1)
        rows: np.ndarray = np.empty((0, 3), np.int64)
        for _ in range(NUM_TABLES):
            chosen = generator.permutation(NUM_BITS)[:64]
            neighbours = _neighbours(_keys(bits.take(chosen, axis=1)), _keys(view_bits.take(chosen, axis=1)))
            rows = _nearest(np.concatenate([rows, _compare(hashes, view, neighbours, max_distance)]))
        found.append(np.sort(rows[:, :2], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _keys(bits: np.ndarray) -> np.ndarray:
    """uint64 [N] that sort as the rows of bits [N, 64]."""
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _neighbours(keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """int64 [N, WINDOW]: for each query, the items around its place in the sorted table of keys."""
    order = np.argsort(keys, kind="stable")
    places = np.searchsorted(keys[order], queries)
    window = places[:, None] + np.arange(WINDOW) - WINDOW // 2
    return order[np.clip(window, 0, len(keys) - 1)]


def _compare(hashes: np.ndarray, view: np.ndarray, neighbours: np.ndarray, max_distance: int) -> np.ndarray:
    """Rows [item, neighbour, distance] of those near enough."""
    distances = sum(
        np.bitwise_count(hashes[neighbours, word] ^ view[:, None, word]).astype(np.int64)
        for word in range(hashes.shape[1])
    )
    is_near = (distances <= max_distance) & (neighbours != np.arange(len(hashes))[:, None])
    items, places = np.nonzero(is_near)
    return np.stack([items, neighbours[items, places], distances[items, places]], axis=1)


def _nearest(rows: np.ndarray) -> np.ndarray:
    """Of rows [item, neighbour, distance], each once, those of the `NUM_NEIGHBOURS` nearest to each item."""
    rows = rows[np.lexsort(rows.T[[1, 2, 0]])]
    rows = rows[np.any(np.diff(rows, axis=0, prepend=-1) != 0, axis=1)]
    starts = np.searchsorted(rows[:, 0], rows[:, 0])
    return rows[np.arange(len(rows)) - starts < NUM_NEIGHBOURS]
