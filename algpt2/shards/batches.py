"""Which rows a step reads: pure functions of the step, without any iterator state.

The rows of all epochs lie on one line. Epoch e holds the positions e * n_rows to
(e + 1) * n_rows - 1, in the order of a permutation drawn from (seed, e). Step s reads the
positions s * batch_rows to (s + 1) * batch_rows - 1, so a batch may straddle two epochs.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..options import TrainOptions
from .tfrecords import PackedRows


def global_rows(step: int, n_rows: int, batch_rows: int, seed: int) -> np.ndarray:
    """Row ids (batch_rows,) int64 of the batch of all processes at `step` (from 0)."""
    positions = np.arange(step * batch_rows, (step + 1) * batch_rows)
    epochs, places = np.divmod(positions, n_rows)
    ids = np.empty(batch_rows, np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        ids[in_epoch] = permutation(n_rows, seed, int(epoch))[places[in_epoch]]
    return ids


def process_rows(
    step: int, n_rows: int, batch_rows: int, seed: int, process: int, n_processes: int
) -> np.ndarray:
    """Row ids (batch_rows / n_processes,) of one process: its contiguous slice of the batch.
    `start_processes` sees to it that the processes divide the batch."""
    ids, size = global_rows(step, n_rows, batch_rows, seed), batch_rows // n_processes
    return ids[process * size : (process + 1) * size]


# Two epochs, as a batch may straddle them; drawing a permutation in every step takes too long.
@functools.lru_cache(maxsize=2)
def permutation(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the rows in an epoch, (n_rows,) int64, read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    order.flags.writeable = False
    return order


def evenly_spaced(n: int, n_some: int | None) -> np.ndarray:
    """Ids (n_some,) of some of `n` rows, the first and the last among them; None: of all."""
    if n_some is None or n_some >= n:
        return np.arange(n)
    return np.linspace(0, n - 1, n_some).astype(np.int64)


class RowInputs:
    """The rows of each step out of packed shards on this machine."""

    def __init__(self, rows: PackedRows, options: TrainOptions, processes: Any) -> None:
        """Args:
        processes: of processes_pt.py or processes_tf.py.
        """
        self.rows, self.options, self.processes = rows, options, processes
        self.seq_len, self.n_rows = rows.manifest.seq_len, len(rows)

    def row_ids(self, step: int) -> list[int]:
        """Ids of the rows of `step`, of all processes."""
        optim, passes = self.options.optim, self._passes(step)
        ids = [global_rows(i, self.n_rows, optim.batch_size, optim.seed) for i in passes]
        return np.concatenate(ids).tolist()

    def batches(self, step: int) -> Iterator[np.ndarray]:
        """Tokens (batch_size / processes, seq_len + 1) of each forward pass of this process."""
        optim, processes = self.options.optim, self.processes
        for i in self._passes(step):
            batch = (i, self.n_rows, optim.batch_size, optim.seed)
            yield self.rows[process_rows(*batch, processes.rank, processes.count)]

    def _passes(self, step: int) -> range:
        grad_steps = self.options.optim.grad_steps
        return range(step * grad_steps, (step + 1) * grad_steps)
