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
    options = parse(TFRecordOptions, argv)
    if options.dry_run:
        from algpt2 import dry_run

        return dry_run.run(options)
    import_tensorflow()
    return evaluate_only(options) if options.eval_only else train(options)


def train(flags: TFRecordOptions) -> int | None:
    """Train until done (None) or stopped by a signal or the clock (EXIT_STOPPED)."""
    from algpt2.input_tf import FileRows, ShardInputs, find_fitting_shards
    from algpt2.processes_tf import start_processes
    from algpt2.run import Run
    from algpt2.start import Start
    from algpt2.trainer_tf import Trainer

    options = flags.train_options()
    processes = start_processes(options, flags.tpu)
    start = Start.find(options.model)
    shards, val_shards = find_fitting_shards(flags, start.config(), start.exact, processes.n_hosts)
    start = start.with_shards(options.data, shards.manifest)
    with Run.open(options, shards, val_shards, processes, flags.train_len) as run:
        inputs = ShardInputs(shards, options, processes)
        trainer = Trainer.build(options, start, inputs, FileRows(val_shards), processes, run)
        done = trainer.fit(run)
    return trainer.finish(done)


def evaluate_only(flags: TFRecordOptions) -> None:
    """Print and save one table of loss, perplexities and bits per byte of a checkpoint."""
    from algpt2 import evaluation_sets
    from algpt2.console import Progress
    from algpt2.input_tf import FileRows, check_shards, find_shards
    from algpt2.processes_tf import start_processes
    from algpt2.start import Start
    from algpt2.trainer_tf import build_model, evaluate

    options = flags.train_options()
    start = Start.find(options.model)
    results = evaluation_sets.ResultFiles(start.result_folder)
    processes = start_processes(options, flags.tpu)
    shards = find_shards("--val_path", flags.val_path)
    with processes.strategy.scope():
        model = build_model(start, processes.dtype)
    check_shards("--val_path", shards, 1, flags.seq_len, model.config.to_dict(), False)
    rows = FileRows(shards)
    with Progress("evaluate", total=len(rows), unit="row") as progress:
        batch_size = options.optim.batch_size
        loss = evaluate(model, rows, processes, batch_size, tick=progress.update)
    evaluation = evaluation_sets.evaluation_of_rows(
        options, start.name, rows.manifest, loss, processes.dtype
    )
    results.add(evaluation)
    evaluation_sets.publish([evaluation], results, start, options)


if __name__ == "__main__":
    run_script(main)
