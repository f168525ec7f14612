"""Commands for everyday use: forget, ask, evaluate, report and the app."""
