"""Evaluation logs: our format and the public ones, read, written and matched."""
