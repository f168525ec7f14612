"""Experiments of several steps: quickstart, reproduction, sequences of requests."""
