"""The store of forget adapters on disk."""
