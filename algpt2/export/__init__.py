"""Checkpoints out into the world: model cards, stock GPT-2."""
