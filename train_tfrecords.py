"""Pretrain GPT-2 or ALGPT2 from TFRecord shards: on a TPU pod, on GPUs, on several machines, here.

    python3 train_tfrecords.py --train_path shards/train --val_path shards/val --batch_size 8
    python3 train_tfrecords.py --tpu algpt2pod --seq_len 1024 --batch_size 512 --epochs 60 \\
        --warmup_steps 10000 --model_type algpt2 --config_path ./algpt2/algpt2/ \\
        --train_path gs://BUCKET/train/*.tfrecord --val_path gs://BUCKET/val/*.tfrecord
    python3 train_tfrecords.py --tpu local ...     # on the one host of a TPU
    TF_CONFIG='{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", \\
        "index": 0}}' python3 train_tfrecords.py ...           # the same on every worker
    python3 train_tfrecords.py --checkpoint runs/tfrecords --eval_only --val_path shards/val
    python3 train_tfrecords.py --config_path algpt2 --batch_size 512 --dry_run v3-128    # no TPU

Repeat a command (on every worker) and the run continues where it stopped; a finished run says so.
"""

from collections.abc import Sequence

from algpt2.options import TFRecordOptions, parse
from algpt2.script import import_tensorflow, run_script


def main(argv: Sequence[str] | None = None) -> int | None:
    """Train or evaluate as the options say; returns the exit code."""
    options = parse(TFRecordOptions, argv, __doc__)
    if options.dry_run:
        from algpt2 import dry_run

        tpu = dry_run.check_command(options)  # before TensorFlow is imported
        from algpt2 import dry_run_tf

        return dry_run_tf.run(options, tpu)
    import_tensorflow()
    return evaluate_only(options) if options.eval_only else train(options)


def train(flags: TFRecordOptions) -> int | None:
    """Train until done (None) or stopped by a signal or the clock (EXIT_STOPPED)."""
    from algpt2 import console, input_tf, loop, mirror, runs, training_tf

    # 1. Devices, and shards that fit them and the model
    options = flags.train_options()
    processes = training_tf.start_processes(options, flags.tpu)
    config, exact = runs.source_config(options.model), not options.model.checkpoint
    data = options.data
    shards = input_tf.find_shards("--train_path", data.train_path)
    val_shards = input_tf.find_shards("--val_path", data.val_path)
    n_hosts = processes.n_hosts
    input_tf.check_shards("--train_path", shards, n_hosts, data.seq_len, config, exact)
    input_tf.check_shards("--val_path", val_shards, 1, data.seq_len, config, exact)
    tokenizer = runs.tokenizer_of(options, shards.manifest)
    inputs = input_tf.ShardInputs(shards, options, processes)
    val_rows = input_tf.FileRows(val_shards)

    # 2. The run: new, or the continuation of the one in save_dir
    n_rows = flags.optim.train_len or shards.manifest.n_rows
    if n_rows != shards.manifest.n_rows:
        console.log(f"--train_len {n_rows:,}: the shards hold {shards.manifest.n_rows:,} rows")
    n_steps = runs.count_steps(options.optim, n_rows, inputs.seq_len)
    run = runs.describe_run(options, shards, val_shards, n_steps)
    with mirror.run_folder(options.report, options.overwrite) as save_dir:
        run, checkpoint = training_tf.open_run(save_dir, run, options.overwrite, processes)

        # 3. Model and optimizer, in the state of the checkpoint
        trainer = training_tf.build_trainer(
            options, tokenizer, inputs, processes, n_steps, checkpoint
        )
        run |= runs.describe_model(trainer.model, inputs.seq_len)
        done = loop.is_done(trainer)
        console.log(runs.summary(run, trainer.step, done))

        # 4. Train
        run |= runs.measure_start(
            trainer.step, options.model, run, lambda: training_tf.validate(trainer, val_rows)
        )
        if not done:
            with loop.start_report(trainer, run) as run_report:
                hooks = training_tf.make_hooks(trainer, tokenizer, val_rows, run, run_report)
                done = training_tf.fit(trainer, hooks)
    return runs.finish(done, trainer.step, run, options)


def evaluate_only(flags: TFRecordOptions) -> None:
    """Print and save one table of loss, perplexities and bits per byte of a checkpoint."""
    from algpt2 import console, input_tf, model_card, results, runs, sets, training_tf

    options = flags.train_options()
    result_files = results.ResultFiles(runs.result_folder(options.model))
    processes = training_tf.start_processes(options, flags.tpu)
    shards = input_tf.find_shards("--val_path", options.data.val_path)
    with processes.strategy.scope():
        model = training_tf.build_model(options.model, None, None, processes.dtype)
    seq_len, config = options.data.seq_len, model.config.to_dict()
    input_tf.check_shards("--val_path", shards, 1, seq_len, config, False)
    rows = input_tf.FileRows(shards)
    with console.Progress("evaluate", total=len(rows), unit="row") as progress:
        batch_size = options.optim.batch_size
        loss = training_tf.evaluate(model, rows, processes, batch_size, tick=progress.update)
    evaluation = sets.evaluation_of_rows(options, rows.manifest, loss, str(processes.dtype))
    result_files.add(evaluation)
    result_files.show([evaluation])
    model_card.publish_evaluation(runs.source_folder(options.model), options.report)


if __name__ == "__main__":
    run_script(main)
