"""Measures a base with its active stack, or merged weights: what is forgotten, what is retained."""
