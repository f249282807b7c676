"""Texts of any length from a model with a limited context, for both frameworks."""

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError
from ..options import SampleOptions, TrainOptions
from ..system import console
from ..tokenization_algpt2 import TextTokenizer

Rows = list[list[int]]


def extend_texts(
    extend: Callable[[Rows, int], Rows],
    tokenizer: TextTokenizer,
    options: SampleOptions,
    context: int | None,
    start_id: int | None = None,
) -> Rows:
    """`n_samples` lists of at most `max_length` ids, without the first and last control code.

    When a text fills the model's context, the window slides: its last `sliding_window_size` tokens
    become the context of the next window, so that only `max_length` bounds a text.

    Args:
        extend: (rows, n) -> at most n new ids for each row. This function drops new ids after a
            control code.
        context: positions of the model; None: no limit.
        start_id: control code before the prompt; None: bos, else end-of-text.
    Raises:
        UserError: the sliding window is not smaller than the context.
    """
    ends, end = {*tokenizer.special_ids}, options.max_length + 1
    start_id = tokenizer.start_id if start_id is None else start_id
    prompt = [start_id, *tokenizer.encode_batch([options.prompt])[0].tolist()]
    texts = [list(prompt) for _ in range(options.n_samples)]
    context = context or end
    keep = options.sliding_window_size or context // 2
    if keep >= context:
        raise UserError(f"--sliding_window_size {keep}: expected less than the context, {context}")
    while active := [t for t in texts if len(t) < end and (t[-1] not in ends or len(t) == 1)]:
        length = len(active[0])  # all active texts are equally long
        n_window = length if length < context else keep
        n_new = min(context - n_window, end - length)
        new_ids = extend([text[-n_window:] for text in active], n_new)
        for text, row in zip(active, new_ids, strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            text += row[:stop]
    return [t[1:-1] if t[-1] in ends and len(t) > 1 else t[1:] for t in texts]


def print_samples(
    sample_texts: Callable[..., list[str]], model: Any, tokenizer: TextTokenizer,
    options: TrainOptions,
) -> None:  # fmt: skip
    """Print the samples of `--sample_only`; a single sample streams token by token.

    Args:
        sample_texts: the function of sampling_pt.py or sampling_tf.py.
    """
    code, sample = (options.data.control_codes or (None,))[0], options.sample
    arguments = (model, tokenizer, sample, options.optim.seed)
    if sample.n_samples == 1:
        console.log("--- sample 1 of 1")
        sample_texts(*arguments, code=code, write=console.write)
        console.log("\n")
        return
    texts = sample_texts(*arguments, code=code)
    for i, text in enumerate(texts, start=1):
        console.log(f"--- sample {i} of {len(texts)}\n{text}\n")


class TextStream:
    """Writes a text while its tokens arrive: whole characters only, no control codes."""

    def __init__(self, tokenizer: TextTokenizer, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.n_written = 0

    def add(self, ids: Sequence[int]) -> None:
        """Write what `ids` add to the text, except a last character that is incomplete."""
        self.ids += [i for i in ids if i not in self.tokenizer.special_ids]
        self._write(self.tokenizer.decode(self.ids).rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self) -> None:
        """Write the rest of the text."""
        self._write(self.tokenizer.decode(self.ids))

    def _write(self, text: str) -> None:
        if len(text) > self.n_written:
            self.write(text[self.n_written :])
            self.n_written = len(text)
