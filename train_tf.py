"""Pretrain or finetune GPT-2 or ALGPT2 in TensorFlow on one machine.

    python3 train_tf.py --max_steps 20                        # tiny ALGPT2 on docs:, a CPU minute
    python3 train_tf.py --config algpt2 --train_path shards/train --val_path shards/val \\
        --batch_size 32 --grad_steps 16 --lr 1e-3 --lr_schedule cosine --warmup_steps 2000
    python3 train_tf.py ... --compile --steps_per_call 10     # on GPUs: all of them, with XLA
    python3 train_tf.py --checkpoint runs/train --eval_only --val_path ptb.txt --detokenizer ptb
    python3 train_tf.py --checkpoint runs/train --sample_only --prompt "The"

Repeat a command and the run continues where it stopped; a finished run says so. Checkpoints are
those of train_pt.py: a run begun there continues here, and the other way round.
"""

from collections.abc import Sequence

from algpt2.options import TFTrainOptions, parse
from algpt2.system.script import import_tensorflow, run_script


def main(argv: Sequence[str] | None = None) -> int | None:
    """Train, evaluate or sample as the options say; returns the exit code."""
    options = parse(TFTrainOptions, argv, __doc__)
    import_tensorflow()
    if options.eval_only:
        return evaluate_only(options)
    if options.sample_only:
        return sample_only(options)
    return train(options)


def train(options: TFTrainOptions) -> int | None:
    """Train until done (None) or stopped by a signal or the clock (EXIT_STOPPED)."""
    from algpt2.export.model_card import check_hub
    from algpt2.runs.run import Run
    from algpt2.runs.start import find_start, open_both
    from algpt2.shards.inputs_tf import RowInputs
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.trainer_tf import Trainer

    processes = start_processes(options)
    check_hub(options.report.push_to_hub)
    start = find_start(options)
    rows, val_rows = open_both(start, options.data, processes)
    with Run.open(options, rows, val_rows, processes) as run:
        inputs = RowInputs(rows, options, processes)
        trainer = Trainer.build(options, start, inputs, val_rows, processes, run)
        done = trainer.fit(run)
    return trainer.finish(done)


def evaluate_only(options: TFTrainOptions) -> None:
    """Print and save one table of what a checkpoint scores on --val_path or --eval_sets."""
    from algpt2.evaluation.results import ResultFiles
    from algpt2.evaluation.scoring_tf import evaluation_model
    from algpt2.evaluation.sets import Evaluator, choose_sets
    from algpt2.export.model_card import check_hub, publish_evaluation
    from algpt2.runs.start import find_start
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.trainer_tf import build_model

    processes = start_processes(options)
    check_hub(options.report.push_to_hub)
    start = find_start(options)
    results = ResultFiles(start.result_folder)
    with processes.main_first():
        sets = choose_sets(options, start)
    model = build_model(start, processes.dtype)
    scorer = evaluation_model(model, start.seq_len, options.optim.batch_size)
    evaluator = Evaluator(
        scorer, start.tokenizer, options, precision=processes.dtype, checkpoint=start.name
    )
    evaluator.evaluate_all(sets, results)
    publish_evaluation(start.folder, options.report)


def sample_only(options: TFTrainOptions) -> None:
    """Print samples of a checkpoint."""
    from algpt2.evaluation.sampling import print_samples
    from algpt2.evaluation.sampling_tf import sample_texts
    from algpt2.runs.start import find_start
    from algpt2.system.processes_tf import start_processes
    from algpt2.training.trainer_tf import build_model

    processes, start = start_processes(options), find_start(options)
    model = build_model(start, processes.dtype)
    print_samples(sample_texts, model, start.tokenizer, options)


if __name__ == "__main__":
    run_script(main)
