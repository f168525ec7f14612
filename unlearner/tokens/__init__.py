"""From rows to tokens, labels and batches."""
