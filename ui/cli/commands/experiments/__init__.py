"""Commands that run experiments: fine-tune, reproduce, sequence, tune, bench."""
