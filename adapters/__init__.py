"""The store of forget adapters and their algebra: the lowest layer, knows nothing of training."""
