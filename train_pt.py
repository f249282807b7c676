"""Pretrain or finetune GPT-2, ALGPT2 or any causal language model in PyTorch.

    python3 train_pt.py --max_steps 20                        # tiny ALGPT2 on docs:, a CPU minute
    python3 train_pt.py --config algpt2 --train_path shards/train --val_path shards/val \\
        --batch_size 32 --grad_steps 16 --lr 1e-3 --lr_schedule cosine --warmup_steps 2000
    torchrun --nproc_per_node 8 train_pt.py ...               # 8 GPUs, the same global batch
    python3 train_pt.py --checkpoint runs/train --eval_only --eval_sets bench/ --detokenizer auto
    python3 train_pt.py --checkpoint runs/train --sample_only --prompt "The"

Repeat a command and the run continues where it stopped; a finished run says so.
"""

from collections.abc import Sequence

from algpt2.options import TrainOptions, parse
from algpt2.system.script import run_script


def main(argv: Sequence[str] | None = None) -> int | None:
    """Train, evaluate or sample as the options say; returns the exit code."""
    options = parse(TrainOptions, argv, __doc__)
    if options.eval_only:
        return evaluate_only(options)
    if options.sample_only:
        return sample_only(options)
    return train(options)


def train(options: TrainOptions) -> int | None:
    """Train until done (None) or stopped by a signal or the clock (EXIT_STOPPED)."""
    from algpt2.export.model_card import check_hub
    from algpt2.runs.run import Run
    from algpt2.runs.start import find_start, open_both
    from algpt2.shards.batches import RowInputs
    from algpt2.system.processes_pt import start_processes
    from algpt2.training.trainer_pt import Trainer

    processes = start_processes(options)
    check_hub(options.report.push_to_hub)
    start = find_start(options)
    rows, val_rows = open_both(start, options.data, processes)
    with Run.open(options, rows, val_rows, processes) as run:
        inputs = RowInputs(rows, options, processes)
        trainer = Trainer.build(options, start, inputs, val_rows, processes, run)
        done = trainer.fit(run)
    return trainer.finish(done)


def evaluate_only(options: TrainOptions) -> None:
    """Print and save one table of what a checkpoint scores on --val_path or --eval_sets."""
    from algpt2.evaluation.results import ResultFiles
    from algpt2.evaluation.scoring_pt import evaluation_model
    from algpt2.evaluation.sets import Evaluator, choose_sets
    from algpt2.export.model_card import check_hub, publish_evaluation
    from algpt2.runs.start import find_start
    from algpt2.system.processes_pt import start_processes
    from algpt2.training.trainer_pt import build_model

    processes = start_processes(options)
    check_hub(options.report.push_to_hub)
    start = find_start(options)
    results = ResultFiles(start.result_folder)
    with processes.main_first():
        sets = choose_sets(options, start)
    model = build_model(start).to(processes.device)
    scorer = evaluation_model(model, processes, start.seq_len, options.optim.batch_size)
    precision = str(processes.dtype).removeprefix("torch.")
    evaluator = Evaluator(
        scorer, start.tokenizer, options, precision=precision, checkpoint=start.name
    )
    evaluator.evaluate_all(sets, results)
    publish_evaluation(start.folder, options.report)


def sample_only(options: TrainOptions) -> None:
    """Print samples of a checkpoint."""
    from algpt2.evaluation.sampling import print_samples
    from algpt2.evaluation.sampling_pt import sample_texts
    from algpt2.runs.start import find_start
    from algpt2.system.processes_pt import start_processes
    from algpt2.training.trainer_pt import build_model

    processes, start = start_processes(options), find_start(options)
    model = build_model(start).to(processes.device)
    print_samples(sample_texts, model, start.tokenizer, options)


if __name__ == "__main__":
    run_script(main)
