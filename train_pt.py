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
from algpt2.script import run_script


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
    from algpt2 import console, loop, mirror, model_card, report, runs, training_pt
    from algpt2.checkpoints import find_checkpoint

    # 1. Processes, tokenizer and data
    processes = training_pt.start_processes(options)
    model_card.check_hub(options.report.push_to_hub)
    tokenizer = runs.choose_tokenizer(options.data, options.model)
    seq_len = runs.choose_seq_len(options.data, options.model)
    rows, val_rows = runs.open_both(options, processes, tokenizer, seq_len)

    # 2. The run: new, or the continuation of the one in save_dir
    n_steps = runs.count_steps(options.optim, len(rows), seq_len)
    run = runs.describe_run(options, rows, val_rows, n_steps)
    with mirror.run_folder(options.report, options.overwrite) as save_dir:
        run = processes.on_main(lambda: report.open_run(save_dir, run, options.overwrite))
        checkpoint = processes.on_main(lambda: report.own_checkpoint(save_dir, run))

        # 3. Model and optimizer, in the state of the checkpoint
        start = (processes, n_steps, checkpoint)
        trainer = training_pt.build_trainer(options, tokenizer, rows, *start)
        run |= runs.describe_model(trainer.model, seq_len)
        done = loop.is_done(trainer)
        console.log(runs.summary(run, trainer.step, done))

        # 4. Train
        run |= runs.measure_start(
            trainer.step, options.model, run, lambda: training_pt.validate(trainer, val_rows)
        )
        if not done:
            with loop.start_report(trainer, run) as run_report:
                hooks = training_pt.make_hooks(trainer, tokenizer, val_rows, run, run_report)
                done = training_pt.fit(trainer, hooks)
                run_report.artifact(find_checkpoint(save_dir))
    return runs.finish(done, trainer.step, run, options)


def evaluate_only(options: TrainOptions) -> None:
    """Print and save one table of what a checkpoint scores on --val_path or --eval_sets."""
    from algpt2 import model_card, results, runs, sets, training_pt
    from algpt2.scoring_pt import evaluation_model

    processes = training_pt.start_processes(options)
    model_card.check_hub(options.report.push_to_hub)
    tokenizer = runs.choose_tokenizer(options.data, options.model, trains=False)
    result_files = results.ResultFiles(runs.result_folder(options.model))
    with processes.main_first():
        seq_len, eval_sets = sets.choose_sets(options, tokenizer)
    model = training_pt.build_model(options.model, tokenizer, seq_len).to(processes.device)
    evaluator = sets.Evaluator(
        evaluation_model(model, processes, seq_len, options.optim.batch_size),
        tokenizer, options, precision=str(processes.dtype).removeprefix("torch."),
    )  # fmt: skip
    evaluator.evaluate_all(eval_sets, result_files)
    model_card.publish_evaluation(runs.source_folder(options.model), options.report)


def sample_only(options: TrainOptions) -> None:
    """Print samples of a checkpoint."""
    from algpt2 import runs, sampling, sampling_pt, training_pt

    processes = training_pt.start_processes(options)
    tokenizer = runs.choose_tokenizer(options.data, options.model, trains=False)
    model = training_pt.build_model(options.model, tokenizer, None).to(processes.device)
    sampling.print_samples(sampling_pt.sample_texts, model, tokenizer, options)


if __name__ == "__main__":
    run_script(main)
