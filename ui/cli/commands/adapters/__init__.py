"""Commands that manage the adapters of a store."""
