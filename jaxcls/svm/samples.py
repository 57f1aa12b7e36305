"""`Samples`: features with labels, weights and folds, in blocks on the devices, or sent there one by one."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxcls.parallel import batch_sharding, make_mesh, memory_limit, put, replicated

MAX_CELLS = 2**26
"""Of a matrix [problems, samples of a block]."""
MAX_BLOCK_BYTES = {"cpu": 2**22}
"""By platform. A CPU's caches hold a block between the two products of a pair: 2.5 times as fast."""
MAX_BLOCK_BYTES_ELSEWHERE = 2**29
MEMORY_SHARE = 0.6
"""Of a device's memory, that samples may fill."""
ALIGNMENT = 64
"""Features are padded with zeros to a multiple, for matrix units and vector loads."""
MAX_SPECTRUM = 4096
"""Features up to which their second moments are decomposed, a matter of D^3 operations."""
SAMPLES_PER_FEATURE = 4
"""That suffice for an estimate of second moments within a small factor in all directions."""


class Block(NamedTuple):
    """Some samples, on the devices.

    Attributes:
        features: float [n, D], the constant feature of the intercept and padding included.
        labels: int32 [n].
        weights: float [n], at least 0.
        folds: int32 [n].
    """

    features: Array | np.ndarray
    labels: Array | np.ndarray
    weights: Array | np.ndarray
    folds: Array | np.ndarray


class Spectrum(NamedTuple):
    """Of the second moments sum_i weight_i x_i x_i', taken as 0 outside R directions.

    Attributes:
        values: float [R].
        vectors: float [D, R], orthonormal columns.
    """

    values: Array | np.ndarray
    vectors: Array | np.ndarray


class Samples:
    """N samples of D features.

    Args:
        features: float32 or float64 [N, D]; whatever gives rows by slices, such as a memory-mapped array.
        labels: int [N].
        weights: float [N].
        folds: int [N]; None: all in fold 0.
        constant: of the feature whose weight is the intercept; 0: there is none.
        num_problems: P, for the size of blocks.
        memory: bytes of a device that may be filled; None: `MEMORY_SHARE` of all.

    Attributes:
        is_resident: whether all are on the devices.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray,
        folds: np.ndarray | None = None,
        *,
        constant: float,
        num_problems: int,
        memory: int | None = None,
    ) -> None:
        self.num_samples, self.num_features = features.shape
        self.dtype = features.dtype
        self._features = features
        self._rest = (
            labels.astype(np.int32),
            weights.astype(features.dtype),
            np.zeros(len(features), np.int32) if folds is None else folds.astype(np.int32),
        )
        self._constant = constant
        self._mesh = make_mesh(jax.local_device_count())
        num_devices = self._mesh.size
        row_bytes = self.width * features.itemsize
        block_bytes = MAX_BLOCK_BYTES.get(jax.default_backend(), MAX_BLOCK_BYTES_ELSEWHERE)
        most = num_devices * min(MAX_CELLS // num_problems, block_bytes // row_bytes)
        num_blocks = -(-self.num_samples // max(most, num_devices))
        self.block_size = -(-self.num_samples // (num_blocks * num_devices)) * num_devices
        if memory is None:
            memory = int(MEMORY_SHARE * memory_limit(self._mesh))
        needed = num_blocks * self.block_size * (row_bytes + 4 * num_problems * features.itemsize)
        self.is_resident = needed <= memory * num_devices
        self._blocks = list(self._send()) if self.is_resident else None

    @property
    def total_weight(self) -> np.floating:
        """Of all samples."""
        return self._rest[1].sum()

    @property
    def width(self) -> int:
        """D of blocks and weights: features, constant and padding."""
        return -(-(self.num_features + 1) // ALIGNMENT) * ALIGNMENT

    def blocks(self) -> Iterator[Block]:
        """All samples, in order; the last ones of the last block may be of weight 0, as fillers."""
        return self._send() if self._blocks is None else iter(self._blocks)

    def replicate(self, values: Any) -> Any:
        """A tree of arrays, a whole copy for every device."""
        return jax.device_put(values, replicated(self._mesh))

    def spectrum(self) -> Spectrum:
        """Estimated from samples spread over all; R is 0 where samples are few or features many."""
        counted = np.flatnonzero(self._rest[1])
        if self.width > min(len(counted), MAX_SPECTRUM):
            return self.replicate(Spectrum(np.zeros(0, self.dtype), np.zeros((self.width, 0), self.dtype)))
        chosen = counted[:: max(1, len(counted) // (SAMPLES_PER_FEATURE * self.width))]
        features, weights = self._pad(self._features[chosen]), self._rest[1][chosen]
        return self.replicate(_spectrum(features, weights * (self.total_weight / weights.sum())))

    def _send(self) -> Iterator[Block]:
        """One block ahead of what is used."""
        ahead: Block | None = None
        for start in range(0, self.num_samples, self.block_size):
            block = self._make_block(slice(start, start + self.block_size))
            if ahead is not None:
                yield ahead
            ahead = block
        if ahead is not None:
            yield ahead

    def _make_block(self, rows: slice) -> Block:
        features = self._pad(self._features[rows])
        fillers = (0, self.block_size - len(features))
        labels, weights, folds = (np.pad(values[rows], fillers) for values in self._rest)
        block = Block(np.pad(features, (fillers, (0, 0))), labels, weights, folds)
        return put(block, batch_sharding(self._mesh))

    def _pad(self, features: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(features), self.width), self.dtype)
        padded[:, : self.num_features] = features
        padded[:, self.num_features] = self._constant
        return padded


@jax.jit
def _spectrum(features: Array, weights: Array) -> Spectrum:
    moments = jnp.matmul(features.T * weights[None], features, precision="highest")
    values, vectors = jnp.linalg.eigh(moments)
    return Spectrum(jnp.maximum(values, 0), vectors)
