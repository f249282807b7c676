"""Numbers and text from a checkpoint."""
