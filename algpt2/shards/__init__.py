"""Documents to packed shards, shards to the rows of a step."""
