"""Text from a causal language model in PyTorch: batched, seeded, as long as one likes."""

import torch
from torch import Tensor

from .options import SampleOptions
from .sampling import extend_texts
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
    """The token ids of the texts, by `generate` of transformers; see `extend_texts`."""
    eot = tokenizer.eot_id

    def extend(rows: list[list[int]], n_new: int) -> list[list[int]]:
        window = torch.tensor(rows, device=model.device)
        texts = model.generate(window, max_new_tokens=n_new, **_flags(window, eot, options))
        return texts[:, window.shape[1] :].tolist()

    context = getattr(model.config, "max_position_embeddings", None)
    return extend_texts(extend, tokenizer, options, context)


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
