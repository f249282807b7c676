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
from algpt2.script import import_tensorflow, run_script


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
    from algpt2 import console, loop, mirror, model_card, runs, training_tf
    from algpt2.checkpoints import find_checkpoint

    # 1. Devices, tokenizer and data
    processes = training_tf.start_processes(options)
    model_card.check_hub(options.report.push_to_hub)
    tokenizer = runs.choose_tokenizer(options.data, options.model)
    seq_len = runs.choose_seq_len(options.data, options.model)
    rows, val_rows = runs.open_both(options, processes, tokenizer, seq_len)
    inputs = training_tf.RowInputs(rows, options, processes)

    # 2. The run: new, or the continuation of the one in save_dir
    n_steps = runs.count_steps(options.optim, len(rows), seq_len)
    run = runs.describe_run(options, rows, val_rows, n_steps)
    with mirror.run_folder(options.report, options.overwrite) as save_dir:
        run, checkpoint = training_tf.open_run(save_dir, run, options.overwrite, processes)

        # 3. Model and optimizer, in the state of the checkpoint
        trainer = training_tf.build_trainer(
            options, tokenizer, inputs, processes, n_steps, checkpoint
        )
        run |= runs.describe_model(trainer.model, seq_len)
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
                run_report.artifact(find_checkpoint(save_dir))
    return runs.finish(done, trainer.step, run, options)


def evaluate_only(options: TFTrainOptions) -> None:
    """Print and save one table of what a checkpoint scores on --val_path or --eval_sets."""
    from algpt2 import model_card, results, runs, sets, training_tf
    from algpt2.scoring_tf import evaluation_model

    processes = training_tf.start_processes(options)
    model_card.check_hub(options.report.push_to_hub)
    tokenizer = runs.choose_tokenizer(options.data, options.model, trains=False)
    result_files = results.ResultFiles(runs.result_folder(options.model))
    seq_len, eval_sets = sets.choose_sets(options, tokenizer)
    model = training_tf.build_model(options.model, tokenizer, seq_len, processes.dtype)
    evaluator = sets.Evaluator(
        evaluation_model(model, seq_len, options.optim.batch_size),
        tokenizer, options, precision=str(processes.dtype),
    )  # fmt: skip
    evaluator.evaluate_all(eval_sets, result_files)
    model_card.publish_evaluation(runs.source_folder(options.model), options.report)


def sample_only(options: TFTrainOptions) -> None:
    """Print samples of a checkpoint."""
    from algpt2 import runs, sampling, sampling_tf, training_tf

    processes = training_tf.start_processes(options)
    tokenizer = runs.choose_tokenizer(options.data, options.model, trains=False)
    model = training_tf.build_model(options.model, tokenizer, None, processes.dtype)
    sampling.print_samples(sampling_tf.sample_texts, model, tokenizer, options)


if __name__ == "__main__":
    run_script(main)
