"""The robustness card: attacks on an unlearned model and their verdicts."""
