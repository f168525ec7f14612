"""Choosing settings: calibration of the strength, search, early stopping."""
