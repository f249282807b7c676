"""Text of any length from a causal language model in PyTorch: batched, seeded, streamed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..options import SampleOptions
from ..tokenization_algpt2 import TextTokenizer
from .sampling import Rows, TextStream, extend_texts


def sample_texts(
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    seed: int,
    *,
    code: str | None = None,
    write: Callable[[str], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """`n_samples` texts that start with the prompt and end at end-of-text or `max_length`.

    The function restores the random number generators and the mode of the model.

    Args:
        code: control code before the prompt; None: bos, else end-of-text.
        write: called with each new piece of the text, if `n_samples` is 1.
        check: called before each token; it may raise.
    """
    start_id = None if code is None else tokenizer.token_to_id(code)
    stream = GenerateStream(tokenizer, write) if write and options.n_samples == 1 else None
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            rows = sample_tokens(model, tokenizer, options, start_id, stream, check)
    finally:
        model.train(was_training)
    return [tokenizer.decode(row) for row in rows]


@torch.no_grad()
def sample_tokens(
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    start_id: int | None = None,
    stream: "GenerateStream | None" = None,
    check: Callable[[], None] = lambda: None,
) -> Rows:
    """The token ids of the texts, sampled by transformers' `generate`; see `extend_texts`."""

    def extend(rows: Rows, n_new: int) -> Rows:
        window = torch.tensor(rows, device=model.device)
        texts = model.generate(
            window, attention_mask=torch.ones_like(window), streamer=stream,
            stopping_criteria=[Check(check)],
            generation_config=_flags(window, tokenizer, options, n_new),
        )  # fmt: skip
        return texts[:, window.shape[1] :].tolist()

    if stream:
        stream.add(tokenizer.encode_batch([options.prompt])[0].tolist())
    context = getattr(model.config, "max_position_embeddings", None)
    with no_defaults(model):
        texts = extend_texts(extend, tokenizer, options, context, start_id)
    if stream:
        stream.finish()
    return texts


@contextlib.contextmanager
def no_defaults(model: torch.nn.Module) -> Iterator[None]:
    """Without the checkpoint's generation_config.json, which fills in whatever no flag says: beams,
    words that stop a text, a limit of time."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _flags(
    window: Tensor, tokenizer: TextTokenizer, options: SampleOptions, n_new: int
) -> GenerationConfig:
    """How `generate` goes on; `extend_texts` drops the padding after ended texts."""
    flags = {
        "max_new_tokens": n_new,
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
    return GenerationConfig(**flags)


class Check(StoppingCriteria):
    """Calls a function before each token, and never stops `generate` but by its exception."""

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class GenerateStream(TextStream, BaseStreamer):
    """A text stream that transformers' `generate` feeds."""

    is_window = True

    def put(self, value: Tensor) -> None:
        """`generate` passes first its window, which is already written, then each new token."""
        if not self.is_window:
            self.add(value.tolist())
        self.is_window = False

    def end(self) -> None:
        """`generate` calls this at the end of a window."""
        self.is_window = True
