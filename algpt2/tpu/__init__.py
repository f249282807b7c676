"""The training step compiled for a TPU slice, without a TPU."""
