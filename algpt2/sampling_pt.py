"""Text from a causal language model in PyTorch: batched, seeded, streamed, as long as one likes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from . import report
from .options import SampleOptions, TrainOptions
from .sampling import Rows, extend_texts
from .tokenization_algpt2 import TextTokenizer


def print_samples(model: torch.nn.Module, tokenizer: TextTokenizer, options: TrainOptions) -> None:
    """The samples of `--sample_only`; one alone is printed as it comes."""
    code, sample = (options.data.control_codes or (None,))[0], options.sample
    arguments = (model, tokenizer, sample, options.optim.seed)
    if sample.n_samples == 1:
        report.log("--- sample 1 of 1")
        sample_texts(*arguments, code=code, write=report.write)
        report.log("\n")
        return
    texts = sample_texts(*arguments, code=code)
    for i, text in enumerate(texts, start=1):
        report.log(f"--- sample {i} of {len(texts)}\n{text}\n")


def sample_texts(
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    seed: int,
    *,
    code: str | None = None,
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """`n_samples` texts that start with the prompt and end at end-of-text or `max_length`.

    The state of the random number generators and the mode of the model are left as they were.

    Args:
        code: control code that stands before the prompt; None: end-of-text.
        write: gets the pieces of the text as they are sampled; of one sample only.
    """
    start_id = tokenizer.eot_id if code is None else tokenizer.token_to_id(code)
    stream = TextStream(tokenizer, write) if write and options.n_samples == 1 else None
    was_training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = sample_tokens(model, tokenizer, options, start_id, stream)
    model.train(was_training)
    return [tokenizer.decode(row) for row in rows]


@torch.no_grad()
def sample_tokens(
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    start_id: int | None = None,
    stream: "TextStream | None" = None,
) -> Rows:
    """The token ids of the texts, by `generate` of transformers; see `extend_texts`."""

    def extend(rows: Rows, n_new: int) -> Rows:
        window = torch.tensor(rows, device=model.device)
        flags = _flags(window, tokenizer, options) | {"streamer": stream}
        texts = model.generate(window, max_new_tokens=n_new, **flags)
        return texts[:, window.shape[1] :].tolist()

    if stream:
        stream.add(tokenizer.encode_batch([options.prompt])[0].tolist())
    context = getattr(model.config, "max_position_embeddings", None)
    texts = extend_texts(extend, tokenizer, options, context, start_id)
    if stream:
        stream.finish()
    return texts


def _flags(window: Tensor, tokenizer: TextTokenizer, options: SampleOptions) -> dict[str, Any]:
    """Arguments of `generate`; what it pads ended texts with is cut off again."""
    flags = {
        "attention_mask": torch.ones_like(window),
        "do_sample": options.do_sample,
        "eos_token_id": tokenizer.special_ids,
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


class TextStream(BaseStreamer):
    """Writes one text as its tokens come: whole characters, control codes left out."""

    def __init__(self, tokenizer: TextTokenizer, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.n_written, self.is_prompt = 0, True

    def add(self, ids: list[int]) -> None:
        """Write what `ids` add to the text, but for a last character that is not whole."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        self._write(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    def put(self, value: Tensor) -> None:
        """Called by `generate`: first with its window, which is written already, then by token."""
        if not self.is_prompt:
            self.add([i for i in value.tolist() if i not in self.tokenizer.special_ids])
        self.is_prompt = False

    def end(self) -> None:
        """Called by `generate` at the end of a window."""
        self.is_prompt = True

    def finish(self) -> None:
        """Write what is left."""
        self._write(self.tokenizer.decode(self.ids))

    def _write(self, text: str) -> None:
        if len(text) > self.n_written:
            self.write(text[self.n_written :])
            self.n_written = len(text)
