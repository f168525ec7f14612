"""Metrics: pure functions from per-row scores to figures."""
