"""Unlearning objectives: pure functions of answer likelihoods."""
