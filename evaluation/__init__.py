"""Measures any base with an active stack, or merged weights: what is forgotten, what is kept."""
