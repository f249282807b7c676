"""Rows of a step: each row once per epoch, whatever the batch, the processes or the start."""

import itertools

import numpy as np
import pytest

from algpt2.shards.batches import global_rows, permutation, process_rows


@pytest.mark.parametrize("batch_rows", [1, 4, 7, 10, 25])
def test_each_row_is_read_once_per_epoch(batch_rows):
    n_rows, n_epochs = 10, 5
    n_steps = n_rows * n_epochs // batch_rows
    line = np.concatenate(
        [global_rows(s, n_rows=n_rows, batch_rows=batch_rows, seed=3) for s in range(n_steps)]
    )
    epochs = [line[i : i + n_rows] for i in range(0, len(line) - n_rows + 1, n_rows)]
    assert len(epochs) >= 4
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_rows))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # each in an order of its own


def test_a_batch_straddles_two_epochs():
    first, second = permutation(5, 7, 0), permutation(5, 7, 1)
    ids = global_rows(1, n_rows=5, batch_rows=4, seed=7)
    assert ids.tolist() == [first[4], *second[:3]]


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_the_slices_of_the_processes_are_the_global_batch(n_processes):
    options = {"n_rows": 13, "batch_rows": 8, "seed": 1}
    for step in range(5):
        slices = [
            process_rows(step, **options, process=i, n_processes=n_processes)
            for i in range(n_processes)
        ]
        assert {len(part) for part in slices} == {8 // n_processes}
        assert np.concatenate(slices).tolist() == global_rows(step, **options).tolist()


def test_a_jump_to_a_step_equals_the_walk_there():
    options = {"n_rows": 9, "batch_rows": 4, "seed": 5}
    permutation.cache_clear()
    jumped = global_rows(37, **options)
    walk = [global_rows(step, **options) for step in range(38)]
    assert walk[37].tolist() == jumped.tolist()


def test_forward_passes_of_an_accumulated_step_are_slices_of_its_batch():
    whole = global_rows(6, n_rows=11, batch_rows=12, seed=2)
    parts = [global_rows(6 * 3 + i, n_rows=11, batch_rows=4, seed=2) for i in range(3)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_the_order_depends_on_the_seed_and_not_on_the_machine():
    # A continued run depends on these numbers: a NumPy that draws other numbers must fail here.
    assert permutation(8, 42, 0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]
    pairs = itertools.product((1, 2), (0, 1))
    assert len({tuple(permutation(8, seed, epoch)) for seed, epoch in pairs}) == 4


def test_nobody_can_change_the_cached_order():
    with pytest.raises(ValueError, match="read-only"):
        permutation(8, 42, 0)[0] = 1
    ids = global_rows(0, n_rows=8, batch_rows=8, seed=42)
    ids[:] = 0
    assert sorted(global_rows(0, n_rows=8, batch_rows=8, seed=42)) == list(range(8))
