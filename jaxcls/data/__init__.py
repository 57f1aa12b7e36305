"""Photos and their labels, from disk to a `Dataset`. Nothing here imports JAX."""
