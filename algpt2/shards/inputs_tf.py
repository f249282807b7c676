"""Packed shards on disk or gs:// as tf.data: the input of a pod, where each host reads its own.

Each shard is read from its start, at full speed. The order is a function of (seed, epoch) alone:

    epoch e    the S shards in an order drawn from (seed, e), each shuffled in a buffer
    host h     the shards at places h, h + H, h + 2 H ... of that order, one row of each in turn
    step s     the next batch_size / H rows of each host

All shards hold equal numbers of rows. So the batch of a step has the same rows for every number of
hosts H that divides S, no host runs out of rows, and a run continues at step s by skipping the rows
before it. The pipeline is TensorFlow's graph and runs on the hosts of a pod without Python.
"""

import re
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import tensorflow as tf

from ..errors import UserError, describe
from ..options import TFTrainOptions
from ..system.processes_tf import Processes
from . import batches
from .tfrecords import FEATURE, MANIFEST_FILE, Manifest, PackedRows, check_files, parse_manifest

SHUFFLED_ROWS = 1 << 16  # in the buffers of all shards together: 134 MB at 1,024 tokens
READ_BYTES = 1 << 28  # read ahead, in all shards together
INPUT_ERRORS = (tf.errors.DataLossError, tf.errors.InvalidArgumentError, tf.errors.NotFoundError)


class Shards(PackedRows):
    """The rows of shards on disk or gs://; a shard is read whole when a row of it is first used."""

    def read_few(self, shard_id: int, places: np.ndarray) -> np.ndarray:
        n_bytes, raw = self.record.itemsize, b""
        with tf.io.gfile.GFile(self.files[shard_id], "rb") as file:
            for place in places.tolist():
                file.seek(place * n_bytes)
                raw += file.read(n_bytes).ljust(n_bytes, b"\0")  # behind the end: damaged
        return self._checked(shard_id, places, np.frombuffer(raw, self.record))

    def _map(self, shard_id: int) -> np.ndarray:
        with tf.io.gfile.GFile(self.files[shard_id], "rb") as file:
            return np.frombuffer(file.read(), self.record)


def find_shards(flag: str, paths: Sequence[str]) -> Shards:
    """The shards that folders, files or patterns name, with the manifest beside them.

    Raises:
        UserError: nothing matches, the manifest is missing, or it lists other shards.
    """
    try:
        return _find_shards(flag, paths)
    except tf.errors.OpError as error:
        raise UserError(f"{flag} {paths[0]} cannot be read: {describe(error)[:200]}") from error


def _find_shards(flag: str, paths: Sequence[str]) -> Shards:
    if len(paths) == 1 and tf.io.gfile.exists(f"{paths[0].rstrip('/')}/{MANIFEST_FILE}"):
        folder, named = paths[0].rstrip("/"), None
    else:
        files = [file for path in paths for file in sorted(tf.io.gfile.glob(path))]
        files = [file for file in files if not file.endswith(MANIFEST_FILE)]
        missing = [path for path in paths if not tf.io.gfile.glob(path)]
        if missing or not files:
            raise UserError(
                f"{flag} {(missing or paths)[0]} matches no file: expected shards of "
                "make_tfrecords.py, by folder, name or pattern, on disk or gs://"
            )
        folders = sorted({file.rpartition("/")[0] or "." for file in files})
        if len(folders) > 1:
            raise UserError(f"{flag} names shards in several folders ({folders[0]}, {folders[1]})")
        folder, named = folders[0], {file.rpartition("/")[2] for file in files}
    path = f"{folder}/{MANIFEST_FILE}"
    if not tf.io.gfile.exists(path):
        raise UserError(f"{folder} has no {MANIFEST_FILE}: expected it beside the shards")
    manifest = parse_manifest(tf.io.gfile.GFile(path, "rb").read(), path)
    shards = Shards(folder, manifest)
    listed = {shard.file for shard in manifest.shards}
    if named is not None and named != listed:
        left_out, unknown = sorted(listed - named), sorted(named - listed)
        raise UserError(
            f"{flag} and {path} disagree: left out {left_out[:3]}, not listed {unknown[:3]}; "
            f"expected its {len(listed)} shards: pass {folder}"
        )
    gfile = tf.io.gfile
    check_files(shards, lambda path: gfile.stat(path).length if gfile.exists(path) else None)
    return shards


def check_shards(
    flag: str, shards: Shards, n_hosts: int, seq_len: int | None, config: dict[str, Any],
    exact: bool,
) -> None:  # fmt: skip
    """`UserError` unless the shards fit hosts and model.

    Args:
        n_hosts: hosts that read; 1 for shards that a single process reads.
        exact: the vocabularies have equal size; else the model's may be padded to a larger one.
    """
    manifest, n_shards = shards.manifest, len(shards.manifest.shards)
    if n_shards % n_hosts:
        raise UserError(
            f"{flag}: {shards.folder} has {n_shards} shards for {n_hosts} hosts: expected a "
            f"multiple of {n_hosts}; pack again: make_tfrecords.py ... "
            f"--n_shards {-(-n_shards // n_hosts) * n_hosts}"
        )
    if seq_len and manifest.seq_len != seq_len:
        raise UserError(
            f"{flag}: {shards.folder} has rows of {manifest.seq_len} tokens, expected {seq_len}: "
            f"pass --seq_len {manifest.seq_len} or pack again"
        )
    n_ids, n_embeddings = manifest.vocab_size, config["vocab_size"]
    if n_ids > n_embeddings or (exact and n_ids != n_embeddings):
        raise UserError(
            f"{flag}: {shards.folder} was packed with {n_ids:,} entries and the model has "
            f"{n_embeddings:,}: expected the same; pack with the model's tokenizer "
            "or choose another --config_path"
        )
    if manifest.seq_len > config["n_positions"]:
        raise UserError(
            f"{flag}: rows of {manifest.seq_len} tokens do not fit the model's "
            f"{config['n_positions']} positions: pack with --seq_len {config['n_positions']}"
        )


def host_rows(
    shards: Shards, host: int, n_hosts: int, seed: int, first_row: int
) -> tf.data.Dataset:
    """The serialized rows of a host from its `first_row`-th on, endlessly."""
    files, manifest = tf.constant(shards.files), shards.manifest
    n_shards, rows_per_shard = len(shards.files), manifest.shards[0].rows
    per_host = n_shards // n_hosts
    first_epoch, skipped = divmod(first_row, per_host * rows_per_shard)
    buffer_rows = max(1, min(rows_per_shard, SHUFFLED_ROWS // n_shards))
    read_bytes = max(1 << 16, min(1 << 23, READ_BYTES // n_shards))

    def shard(file: tf.Tensor, shard_seed: tf.Tensor) -> tf.data.Dataset:
        rows = tf.data.TFRecordDataset(file, buffer_size=read_bytes)
        return rows.shuffle(buffer_rows, seed=shard_seed, reshuffle_each_iteration=False)

    def epoch(e: tf.Tensor) -> tf.data.Dataset:
        draw = tf.random.stateless_uniform(
            [2, n_shards], tf.stack([tf.cast(seed, tf.int64), e]), 1, 2**31 - 1, tf.int32,
            alg="philox",
        )  # fmt: skip
        order = tf.argsort(draw[0], stable=True)[host::n_hosts]
        mine = tf.data.Dataset.from_tensor_slices(
            (tf.gather(files, order), tf.cast(tf.gather(draw[1], order), tf.int64))
        )
        return mine.interleave(
            shard, cycle_length=per_host, block_length=1, deterministic=True,
            num_parallel_calls=tf.data.AUTOTUNE,
        )  # fmt: skip

    rows = tf.data.Dataset.range(first_epoch, 2**31).flat_map(epoch)
    return rows.skip(skipped)


def parse_rows(serialized: tf.Tensor, manifest: Manifest) -> tf.Tensor:
    """Tokens (n, seq_len + 1) int32 of n serialized records."""
    feature = {FEATURE.decode(): tf.io.FixedLenFeature([], tf.string)}
    data = tf.io.parse_example(serialized, feature)[FEATURE.decode()]
    n_bytes = (manifest.seq_len + 1) * np.dtype(manifest.dtype).itemsize
    raw = tf.io.decode_raw(data, tf.dtypes.as_dtype(manifest.dtype), fixed_length=n_bytes)
    return tf.ensure_shape(tf.cast(raw, tf.int32), [None, manifest.seq_len + 1])


class ShardInputs:
    """Tokens of the steps from shards; `Inputs` of a Trainer.

    Each replica gets (steps_per_call, grad_steps, B / replicas, T + 1).
    """

    def __init__(self, shards: Shards, options: TFTrainOptions, processes: Processes) -> None:
        self.shards, self.options, self.processes = shards, options, processes
        self.seq_len, self.wait_s = shards.manifest.seq_len, 0.0
        self.first, self.tokens, self.iterator = -1, None, None

    def take(self, step: int) -> tuple[Any, int]:
        n_steps = self.options.steps_per_call
        if self.iterator is None or not self.first <= step <= self.first + n_steps:
            self.iterator, self.first = self._iterator(step), step - n_steps
        if step == self.first + n_steps:
            self.first = step
            self._next()
        return self.tokens, step - self.first

    def row_ids(self, step: int) -> None:
        """None: the shards are read as streams."""

    def _next(self) -> None:
        start_s = time.monotonic()
        try:
            self.tokens = next(self.iterator)
        except INPUT_ERRORS as error:
            refuse_corrupt(self.shards, describe(error))
        self.wait_s += time.monotonic() - start_s

    def _iterator(self, step: int) -> Any:
        strategy = self.processes.strategy

        def dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
            n_hosts = context.num_input_pipelines
            return self.dataset(step, context.input_pipeline_id, n_hosts)

        return iter(strategy.distribute_datasets_from_function(dataset))

    def dataset(self, step: int, host: int, n_hosts: int) -> tf.data.Dataset:
        """The tokens of the replicas of a host, in turn, from `step` on."""
        optim, manifest = self.options.optim, self.shards.manifest
        rows_per_step = optim.grad_steps * optim.batch_size // n_hosts
        n_replicas = self.processes.n_replicas // n_hosts
        shape = [self.options.steps_per_call, optim.grad_steps, n_replicas,
                 optim.batch_size // self.processes.n_replicas, manifest.seq_len + 1]  # fmt: skip

        def parse(serialized: tf.Tensor) -> tf.Tensor:
            tokens = tf.reshape(parse_rows(serialized, manifest), shape)
            return tf.transpose(tokens, [2, 0, 1, 3, 4])

        rows = host_rows(self.shards, host, n_hosts, optim.seed, step * rows_per_step)
        calls = rows.batch(self.options.steps_per_call * rows_per_step, drop_remainder=True)
        calls = calls.map(parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        options = tf.data.Options()
        # Autotune's thread doubles its sleep each time, and a run ends only when it wakes: 15 s
        # after 100 steps (benchmarks/faults.py signals).
        options.autotune.enabled = False
        return calls.unbatch().prefetch(2 * n_replicas).with_options(options)


def refuse_corrupt(shards: Shards, message: str) -> NoReturn:
    """Raise the `UserError` for a record that TensorFlow could not read: its shard and row."""
    if found := re.search(r"(?:corrupted|truncated) record at (\d+)", message):
        row = np.array([int(found[1]) // shards.record.itemsize])
        for shard_id in range(len(shards.files)):
            shards.read_few(shard_id, row)
    raise UserError(f"a shard in {shards.folder} cannot be read: {message[:300]}")


class RowInputs(batches.RowInputs):
    """Tokens of the steps from memory-mapped shards; `Inputs` of a Trainer.

    The order is that of train_pt.py. Each replica gets (steps_per_call, grad_steps, B / replicas,
    T + 1).
    """

    wait_s = 0.0  # reading a memory map is part of the step
    first, tokens = -1, None

    def take(self, step: int) -> tuple[Any, int]:
        n_steps = self.options.steps_per_call
        if self.first < 0 or not self.first <= step < self.first + n_steps:
            self.first, self.tokens = step, self._read(step, n_steps)
        return self.tokens, step - self.first

    def _read(self, step: int, n_steps: int) -> Any:
        steps = range(step, step + n_steps)
        tokens = np.stack([rows for i in steps for rows in self.batches(i)]).astype(np.int32)
        shape = (n_steps, -1, self.processes.n_local, tokens.shape[1] // self.processes.n_local)
        tokens = tokens.reshape(*shape, self.seq_len + 1)
        return self.processes.distribute(np.moveaxis(tokens, 2, 0))
