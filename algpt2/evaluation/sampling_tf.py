"""Text of any length from the Keras model: batched, seeded, streamed, with a KV cache."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from ..modeling_tf_algpt2 import Cache, TFALGPT2LMHeadModel
from ..options import SampleOptions
from ..tokenization_algpt2 import TextTokenizer
from .sampling import Rows, TextStream, extend_texts


def sample_texts(
    model: TFALGPT2LMHeadModel,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    seed: int,
    *,
    code: str | None = None,
    write: Callable[[str], None] | None = None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """`n_samples` texts that start with the prompt and end at end-of-text or `max_length`.

    Args:
        code: control code before the prompt; None: bos, else end-of-text.
        write: called with each new piece of the text, if `n_samples` is 1.
        check: called before each token; it may raise.
    """
    start_id = None if code is None else tokenizer.token_to_id(code)
    stream = TextStream(tokenizer, write) if write and options.n_samples == 1 else None
    rows = sample_tokens(model, tokenizer, options, seed, start_id, stream, check)
    return [tokenizer.decode(row) for row in rows]


def sample_tokens(
    model: TFALGPT2LMHeadModel,
    tokenizer: TextTokenizer,
    options: SampleOptions,
    seed: int = 0,
    start_id: int | None = None,
    stream: TextStream | None = None,
    check: Callable[[], None] = lambda: None,
) -> Rows:
    """The token ids of the texts; see `extend_texts`."""
    draw, ends = np.random.default_rng(seed), [*tokenizer.special_ids]

    @tf.function(reduce_retracing=True)
    def read_window(ids: tf.Tensor) -> tuple[tf.Tensor, Cache]:
        output = model(ids, use_cache=True)
        return output.logits[:, -1], output.past_key_values

    @tf.function(reduce_retracing=True)
    def read_token(ids: tf.Tensor, past: Cache) -> tuple[tf.Tensor, Cache]:
        output = model(ids, past_key_values=past, use_cache=True)
        return output.logits[:, -1], output.past_key_values

    def extend(rows: Rows, n_new: int) -> Rows:
        ids = np.array(rows, np.int32)
        logits, past = read_window(tf.constant(ids))
        ended = np.zeros(len(ids), bool)
        for i in range(n_new):
            check()
            new_ids = choose_tokens(logits.numpy().astype(np.float64), ids, options, draw)
            ids = np.concatenate([ids, new_ids[:, None]], 1)
            if stream:
                stream.add(new_ids.tolist())
            ended |= np.isin(new_ids, ends)
            if ended.all() or i == n_new - 1:
                break
            logits, past = read_token(tf.constant(ids[:, -1:]), past)
        return ids[:, len(rows[0]) :].tolist()

    if stream:
        stream.add(tokenizer.encode_batch([options.prompt])[0].tolist())
    texts = extend_texts(extend, tokenizer, options, model.config.n_positions, start_id)
    if stream:
        stream.finish()
    return texts


def choose_tokens(
    logits: np.ndarray, ids: np.ndarray, options: SampleOptions, draw: np.random.Generator
) -> np.ndarray:
    """The next id of each row, (B,), by transformers' rules and in their order.

    Args:
        logits: (B, V), changed in place.
        ids: (B, T), the window so far.
    """
    if options.repetition_penalty != 1:
        seen = np.take_along_axis(logits, ids, 1)
        penalty = options.repetition_penalty
        seen = np.where(seen < 0, seen * penalty, seen / penalty)
        np.put_along_axis(logits, ids, seen, 1)
    if not options.do_sample:
        return logits.argmax(1)
    logits /= options.temperature
    order = np.argsort(-logits, 1, kind="stable")
    ranked = np.take_along_axis(logits, order, 1)
    p = np.exp(ranked - ranked[:, :1])
    if options.top_k:
        p[:, options.top_k :] = 0
    p /= p.sum(1, keepdims=True)
    p[np.cumsum(p, 1) - p >= options.top_p] = 0  # never the likeliest
    cumulative = np.cumsum(p, 1)
    ranks = (cumulative < draw.random((len(p), 1)) * cumulative[:, -1:]).sum(1)
    return np.take_along_axis(order, ranks[:, None], 1)[:, 0]
