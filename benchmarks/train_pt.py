"""Speed and memory of a training step: this project against transformers' Trainer.

    python3 benchmarks/train_pt.py             # algpt2/gpt2 and algpt2/algpt2, 4 x 256, float32
    python3 benchmarks/train_pt.py --configs algpt2-tiny --rounds 3

One process a measurement, the contestants alternate, medians and ratios over the rounds. Every
contestant trains on the same tokens with AdamW, clipping at 1, no dropout.
"""

import tempfile
import time
from collections.abc import Sequence

import tyro
from harness import (
    Options,
    alternate,
    answer,
    make_tokens,
    measure_train_pt,
    no_dropout,
    result,
    save,
)

from algpt2.system.console import table


def main(argv: Sequence[str] | None = None) -> None:
    """Measure alternately, print and save the table."""
    options = tyro.cli(Options, args=argv, use_underscores=True)
    if options.measure:
        return answer({"ours": measure_train_pt, "Trainer": measure_trainer}, options)
    lines = [["", "tokens/s", "ratio", "peak GB", "ratio"]]
    results = {}
    for config in options.configs:
        results[config] = alternate(__file__, config, ["ours", "Trainer"], options)
        medians = results[config]["medians"]
        base = medians["Trainer"]
        for name, label in (
            ("ours", f"train_pt.py, {config}"),
            ("Trainer", "Trainer, GPT2LMHeadModel"),
        ):
            line = [label]
            for unit, digits in (("tokens_per_s", 0), ("peak_gb", 2)):
                value = medians[name][unit]
                line += [f"{value:.{digits}f}", f"{value / base[unit]:.2f}"]
            lines.append(line)
    print(table(lines))
    save("train_pt", results)


def measure_trainer(config: str, options: Options) -> dict[str, float]:
    """`transformers.Trainer` with GPT2LMHeadModel of the same shape, its own loss and loader."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    ours = no_dropout(config)
    model_config = GPT2Config(
        vocab_size=ours.vocab_size, n_positions=ours.n_positions, n_embd=ours.n_embd,
        n_layer=ours.n_layer, n_head=ours.n_head, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=ours.bos_token_id, eos_token_id=ours.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel(model_config)
    tokens = torch.from_numpy(make_tokens(model_config.vocab_size, options)[:, :-1]).long()
    data = [{"input_ids": row, "labels": row} for row in tokens]
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, max_steps=options.steps + 2,
            learning_rate=1e-4, weight_decay=0.1, adam_beta2=0.95, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    seconds = [end - start for start, end in zip(times[::2], times[1::2], strict=True)]
    return result(seconds[2:], options)


if __name__ == "__main__":
    main()
