"""Turns a forget request into an adapter: data, prompts, objectives, training."""
