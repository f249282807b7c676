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
from algpt2.system.script import import_tensorflow, run_script


def main(argv: Sequence[str] | None = None) -> int | None:
    """Train or evaluate as the options say; returns the exit code."""
    options = parse(TFRecordOptions, argv, __doc__)
    if options.dry_run:
        from algpt2.tpu import dry_run

        tpu = dry_run.check_command(options)  # before TensorFlow is imported
        from algpt2.tpu import dry_run_tf

        return dry_run_tf.run(options, tpu)
    import_tensorflow()
    return evaluate_only(options) if options.eval_only else train(options)


def train(flags: TFRecordOptions) -> int | None:
    """Train until done (None) or stopped by a signal or the clock (EXIT_STOPPED)."""
    from algpt2.runs.run import Run
    from algpt2.runs.start import Start
    from algpt2.shards.inputs_tf import ShardInputs, check_shards, find_shards
    from algpt2.system.console import log
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.trainer_tf import Trainer

    options, n_rows = flags.train_options(), flags.optim.train_len
    processes = start_processes(options, flags.tpu)
    start = Start.find(options.model)
    data, fits = options.data, (options.data.seq_len, start.config(), not options.model.checkpoint)
    shards = find_shards("--train_path", data.train_path)
    val_shards = find_shards("--val_path", data.val_path)
    check_shards("--train_path", shards, processes.n_hosts, *fits)
    check_shards("--val_path", val_shards, 1, *fits)
    if n_rows not in (None, shards.manifest.n_rows):
        log(f"--train_len {n_rows:,}: the shards hold {shards.manifest.n_rows:,} rows")
    start = start.with_shards(data, shards.manifest)
    with Run.open(options, shards, val_shards, processes, n_rows) as run:
        inputs = ShardInputs(shards, options, processes)
        trainer = Trainer.build(options, start, inputs, val_shards, processes, run)
        done = trainer.fit(run)
    return trainer.finish(done)


def evaluate_only(flags: TFRecordOptions) -> None:
    """Print and save one table of loss, perplexities and bits per byte of a checkpoint."""
    from algpt2.evaluation.results import ResultFiles
    from algpt2.evaluation.sets import evaluation_of_rows
    from algpt2.export.model_card import publish_evaluation
    from algpt2.runs.start import Start
    from algpt2.shards.inputs_tf import check_shards, find_shards
    from algpt2.system.console import Progress
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.trainer_tf import build_model, evaluate

    options = flags.train_options()
    start = Start.find(options.model)
    results = ResultFiles(start.result_folder)
    processes = start_processes(options, flags.tpu)
    rows = find_shards("--val_path", options.data.val_path)
    with processes.strategy.scope():
        model = build_model(start, processes.dtype)
    seq_len, config = options.data.seq_len, model.config.to_dict()
    check_shards("--val_path", rows, 1, seq_len, config, False)
    with Progress("evaluate", total=len(rows), unit="row") as progress:
        batch_size = options.optim.batch_size
        loss = evaluate(model, rows, processes, batch_size, tick=progress.update)
    evaluation = evaluation_of_rows(options, start.name, rows.manifest, loss, processes.dtype)
    results.add(evaluation)
    results.show([evaluation])
    publish_evaluation(start.folder, options.report)


if __name__ == "__main__":
    run_script(main)
