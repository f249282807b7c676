"""Speed of training in TensorFlow: train_tf.py against keras-hub's GPT-2 and against train_pt.py.

    python3 benchmarks/train_tf.py             # gpt2 and algpt2, 4 x 256, float32; and the input
    python3 benchmarks/train_tf.py --configs algpt2-tiny --rounds 2

keras-hub is no part of the installation: `pip install --no-deps keras-hub`, or it is left out.
0.32.0 runs with Keras 3.15.1, without tensorflow-text. It trains with Keras' `fit`, AdamW and
clipping at 1, without dropout, like the others; of an ALGPT2 it is the GPT-2 of the same shape.
"products alone" are TensorFlow's matrix products of a step and nothing else: the fastest step that
there could be. The input is that of train_tfrecords.py and of train_tf.py alone. Results:
results/train_tf.json.
"""

import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tyro
from harness import (
    Options,
    alternate,
    answer,
    make_tokens,
    measure_train_pt,
    no_dropout,
    result,
    run_measurement,
    save,
    time_steps,
    write_shards,
)

from algpt2.shards.tfrecords import open_rows
from algpt2.system.console import table

# A v3-128: 16 hosts, 64 chips of 123 TFLOP/s in bfloat16 (Google's figure).
POD_HOSTS, POD_FLOPS, POD_SHARE = 16, 64 * 123e12, 0.4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure alternately, print and save the tables."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.measure:
        return answer({
            "train_tf.py": measure_train_tf, "train_pt.py": measure_train_pt,
            "keras-hub fit": measure_keras_hub, "products alone": measure_products,
            "shards": measure_shards, "rows": measure_rows,
        }, options)  # fmt: skip
    contestants = ["train_tf.py", "train_pt.py", "products alone"]
    if importlib.util.find_spec("keras_hub"):
        contestants.append("keras-hub fit")
    else:
        print("keras-hub is not installed: left out")
    results = {
        config: alternate(__file__, config, contestants, options) for config in options.configs
    }
    lines = [["", "tokens/s", "train_tf.py is", "peak GB"]]
    for config, found in results.items():
        ours = found["medians"]["train_tf.py"]["tokens_per_s"]
        for name in contestants:
            speed, peak = (found["medians"][name][key] for key in ("tokens_per_s", "peak_gb"))
            lines.append(
                [f"{name}, {config}", f"{speed:.0f}", f"{ours / speed:.2f}", f"{peak:.2f}"]
            )
    print(table(lines))
    results["input"] = measure_input(results, options)
    save("train_tf", results)


def measure_input(results: dict, options: Options) -> dict[str, float]:
    """The input alone, against the fastest step here and against what a pod would eat."""
    fastest = max(found["medians"]["train_tf.py"]["tokens_per_s"] for found in results.values())
    # 64,000 rows: four times through the shards, so that nothing hides in the shuffle buffers.
    lines = [["input alone", "tokens/s", "times the fastest step"]]
    speeds = {}
    for name in ("shards", "rows"):
        found = run_measurement(__file__, name, "gpt2", replace(options, batch_size=32, steps=200))
        speeds[name] = found["tokens_per_s"]
        lines.append([name, f"{speeds[name]:,.0f}", f"{speeds[name] / fastest:,.0f}"])
    print(table(lines))
    for config in options.configs:
        need = POD_SHARE * POD_FLOPS / no_dropout(config).flops_per_token(1024) / POD_HOSTS
        print(
            f"{config} on a v3-128 at {POD_SHARE:.0%} of peak: {need:,.0f} tokens/s for each of "
            f"{POD_HOSTS} hosts; one process reads {speeds['shards'] / need:.0f} times that here"
        )
    return speeds


def measure_train_tf(config: str, options: Options) -> dict[str, float]:
    """`train_step` as train_tf.py runs it."""
    from algpt2.modeling_tf_algpt2 import TFALGPT2LMHeadModel
    from algpt2.options import OptimOptions, TFTrainOptions
    from algpt2.shards.inputs_tf import RowInputs
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.optimizers_tf import build_optimizer
    from algpt2.training.trainer_tf import Trainer

    optim = OptimOptions(batch_size=options.batch_size, lr=1e-4)
    train_options = TFTrainOptions(optim=optim)
    processes = start_processes(train_options)
    model = TFALGPT2LMHeadModel(no_dropout(config))
    optimizer = build_optimizer(model, optim, optim.lr)
    vocab_size = model.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, [make_tokens(vocab_size, options)], vocab_size)
        inputs = RowInputs(open_rows(folder), train_options, processes)
        trainer = Trainer(model, optimizer, train_options, processes, inputs, 10**6)
        return time_steps(lambda: trainer.train_step(), options)


def measure_keras_hub(config: str, options: Options) -> dict[str, float]:
    """Keras' `fit` with keras-hub's GPT-2 of the same shape and a tied head."""
    import keras
    from keras_hub.models import GPT2Backbone

    shape = no_dropout(config)
    backbone = GPT2Backbone(
        vocabulary_size=shape.vocab_size, num_layers=shape.n_layer, num_heads=shape.n_head,
        hidden_dim=shape.n_embd, intermediate_dim=shape.inner_size, dropout=0.0,
        max_sequence_length=shape.n_positions,
    )  # fmt: skip
    logits = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits)
    model.compile(
        keras.optimizers.AdamW(1e-4, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,  # on CPUs the faster of the two
    )
    tokens = make_tokens(shape.vocab_size, options).astype(np.int32)
    inputs = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    times = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            times.append(time.perf_counter())

    n = (options.steps + 2) * options.batch_size
    repeats = np.arange(n) % len(tokens)
    model.fit(
        {name: array[repeats] for name, array in inputs.items()}, tokens[repeats, 1:], verbose=0,
        batch_size=options.batch_size, callbacks=[Clock()],
    )  # fmt: skip
    return result([b - a for a, b in itertools.pairwise(times[1:])], options)


def measure_products(config: str, options: Options) -> dict[str, float]:
    """The matrix products of a step: of each forward one, two more backward."""
    import tensorflow as tf

    shape = no_dropout(config)
    n, t, width, heads = options.batch_size, options.seq_len, shape.n_embd, shape.n_head
    inner, embedding = shape.inner_size, shape.embedding_size
    linear = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    products = [([n * t], size, shape.n_layer) for size in linear]
    products += [([n * heads, t], (width // heads, t), 2 * shape.n_layer)]  # scores and their mix
    products += [([n * t], (embedding, shape.vocab_size), 1)]
    if embedding != width:
        products += [([n * t], (embedding, width), 2)]
    draw = tf.random.Generator.from_seed(0)
    arrays = [
        (draw.normal([*rows, k]), draw.normal([*rows[:-1], k, columns]), times)
        for rows, (k, columns), times in products
    ]

    def step() -> None:
        for a, b, times in arrays:
            for _ in range(times):
                y = tf.matmul(a, b)
                tf.matmul(y, b, transpose_b=True), tf.matmul(a, y, transpose_a=True)

    return time_steps(step, options)


def measure_shards(config: str, options: Options) -> dict[str, float]:
    """The input of train_tfrecords.py: the shards as a tf.data stream."""
    from algpt2.shards.inputs_tf import ShardInputs, find_shards

    return time_inputs(config, options, lambda folder: find_shards("", [folder]), ShardInputs)


def measure_rows(config: str, options: Options) -> dict[str, float]:
    """The input of train_tf.py: rows by their number."""
    from algpt2.shards.inputs_tf import RowInputs

    return time_inputs(config, options, open_rows, RowInputs)


def time_inputs(
    config: str, options: Options, open_: Callable[[str], Any], inputs_class: Callable[..., Any]
) -> dict[str, float]:
    """Speed of `options.steps` calls that each take 10 steps' rows, opening the files included.

    The rows: 16 shards of 1,024 random rows of 1,024 tokens, 34 MB.
    """
    from algpt2.options import OptimOptions, TFTrainOptions
    from algpt2.system.processes_tf import start_processes

    draw, vocab_size, n = np.random.default_rng(0), no_dropout(config).vocab_size, 10
    rows = (draw.integers(0, vocab_size, (1024, 1025)).astype(np.uint16) for _ in range(16))
    optim = OptimOptions(batch_size=options.batch_size)
    train_options = TFTrainOptions(optim=optim, steps_per_call=n)
    processes = start_processes(train_options)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, rows, vocab_size)
        inputs = inputs_class(open_(folder), train_options, processes)
        start_s = time.perf_counter()
        for call in range(options.steps):
            inputs.take(call * n)
        seconds = time.perf_counter() - start_s
    return result([seconds / (n * options.steps)], replace(options, seq_len=1024))


if __name__ == "__main__":
    main()
