"""A Keras model as `scoring.Model`: one function from rows of tokens to log-probabilities."""

import numpy as np
import tensorflow as tf

from ..modeling_tf_algpt2 import TFALGPT2LMHeadModel
from .scoring import Model


def evaluation_model(model: TFALGPT2LMHeadModel, context: int, batch_size: int) -> Model:
    """The model as `scoring.Model`, on one device.

    Args:
        context: tokens that a window reads at most.
        batch_size: rows of `context` tokens per forward pass.
    """

    @tf.function(reduce_retracing=True)
    def step(rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        inputs, labels = rows[:, :-1], rows[:, 1:]
        logits = tf.cast(model(inputs).logits, tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
        return -losses, tf.argmax(logits, -1, output_type=rows.dtype) == labels

    def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        log_probs, is_likeliest = step(tf.constant(rows.astype(np.int32)))
        return log_probs.numpy(), is_likeliest.numpy()

    return Model(score, context, batch_size * context)
