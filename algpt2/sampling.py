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
) -> Rows:
    """`n_samples` lists of at most `max_length` ids, without the end-of-text before and behind.

    Past the model's context the window slides: the last `sliding_window_size` tokens stay as
    context for the next window, so that only `max_length` bounds a text.

    Args:
        extend: at most so many new ids for each row of a window; what follows an end-of-text is
            left out here.
        context: positions of the model; None: no limit.
    Raises:
        UserError: a sliding window that is not smaller than the context.
    """
    eot, end = tokenizer.eot_id, options.max_length + 1
    prompt = [eot, *tokenizer.encode_batch([options.prompt])[0].tolist()]
    texts = [list(prompt) for _ in range(options.n_samples)]
    context = context or end
    keep = options.sliding_window_size or context // 2
    if keep >= context:
        raise UserError(f"--sliding_window_size {keep}: expected less than the context, {context}")
    while active := [text for text in texts if len(text) < end and eot not in text[1:]]:
        length = len(active[0])  # all that have not ended are equally long
        n_window = length if length < context else keep
        more = extend([text[-n_window:] for text in active], min(context - n_window, end - length))
        for text, row in zip(active, more, strict=True):
            text += row[: row.index(eot) + 1] if eot in row else row
    return [text[1:-1] if text[-1] == eot else text[1:] for text in texts]
