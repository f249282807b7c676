"""Texts of any length from a model with a limited context: framework-free."""

from collections.abc import Callable

from .errors import UserError
from .options import SampleOptions
from .tokenization_algpt2 import TextTokenizer

Rows = list[list[int]]


def extend_texts(
    extend: Callable[[Rows, int], Rows],
    tokenizer: TextTokenizer,
    options: SampleOptions,
    context: int | None,
    start_id: int | None = None,
) -> Rows:
    """`n_samples` lists of at most `max_length` ids, without the control code before and behind.

    Past the model's context the window slides: the last `sliding_window_size` tokens stay as
    context for the next window, so that only `max_length` bounds a text.

    Args:
        extend: at most so many new ids for each row of a window; what follows a control code is
            left out here.
        context: positions of the model; None: no limit.
        start_id: control code before the prompt; None: end-of-text.
    Raises:
        UserError: a sliding window that is not smaller than the context.
    """
    ends, end = {*tokenizer.special_ids}, options.max_length + 1
    start_id = tokenizer.eot_id if start_id is None else start_id
    prompt = [start_id, *tokenizer.encode_batch([options.prompt])[0].tolist()]
    texts = [list(prompt) for _ in range(options.n_samples)]
    context = context or end
    keep = options.sliding_window_size or context // 2
    if keep >= context:
        raise UserError(f"--sliding_window_size {keep}: expected less than the context, {context}")
    while active := [t for t in texts if len(t) < end and (t[-1] not in ends or len(t) == 1)]:
        length = len(active[0])  # all that have not ended are equally long
        n_window = length if length < context else keep
        more = extend([text[-n_window:] for text in active], min(context - n_window, end - length))
        for text, row in zip(active, more, strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            text += row[:stop]
    return [t[1:-1] if t[-1] in ends and len(t) > 1 else t[1:] for t in texts]
