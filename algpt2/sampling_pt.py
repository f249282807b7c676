"""Text from a causal language model in PyTorch: batched, seeded, as long as one likes."""

import torch
from torch import Tensor

from .errors import UserError
from .options import SampleOptions
from .tokenization_algpt2 import TextTokenizer


def sample_texts(
    model: torch.nn.Module, tokenizer: TextTokenizer, options: SampleOptions, seed: int
) -> list[str]:
    """`n_samples` texts that start with the prompt and end at end-of-text or `max_length`.

    The state of the random number generators and the mode of the model are left as they were.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = sample_tokens(model, tokenizer, options)
    model.train(was_training)
    return [tokenizer.decode(row) for row in rows]


@torch.no_grad()
def sample_tokens(
    model: torch.nn.Module, tokenizer: TextTokenizer, options: SampleOptions
) -> list[list[int]]:
    """`n_samples` lists of at most `max_length` ids, without the end-of-text before and behind.

    Past the model's context the window slides: the last `sliding_window_size` tokens stay as
    context for the next window, so that only `max_length` bounds a text.

    Raises:
        UserError: a sliding window that is not smaller than the context.
    """
    eot, end = tokenizer.eot_id, options.max_length + 1
    prompt = [eot, *tokenizer.encode_batch([options.prompt])[0].tolist()]
    texts = [list(prompt) for _ in range(options.n_samples)]
    context = getattr(model.config, "max_position_embeddings", None) or end
    keep = options.sliding_window_size or context // 2
    if keep >= context:
        raise UserError(f"--sliding_window_size {keep}: expected less than the context, {context}")
    while active := [text for text in texts if len(text) < end and eot not in text[1:]]:
        length = len(active[0])  # all that have not ended are equally long
        n_window = length if length < context else keep
        window = torch.tensor([text[-n_window:] for text in active], device=model.device)
        n_new = min(context - n_window, end - length)
        more = model.generate(window, max_new_tokens=n_new, **_flags(window, eot, options))
        for text, row in zip(active, more[:, n_window:].tolist(), strict=True):
            text += row[: row.index(eot) + 1] if eot in row else row
    return [text[1:-1] if text[-1] == eot else text[1:] for text in texts]


def _flags(window: Tensor, eot: int, options: SampleOptions) -> dict[str, object]:
    """Arguments of `generate`; what it pads ended texts with is cut off again."""
    flags = {
        "attention_mask": torch.ones_like(window),
        "do_sample": options.do_sample,
        "eos_token_id": eot,
        "pad_token_id": int(window[0, -1] == 0),  # any id that does not look like padding
        "repetition_penalty": options.repetition_penalty,
    }
    if options.do_sample:
        flags |= {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        }
    return flags
