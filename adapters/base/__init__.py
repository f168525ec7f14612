"""The base model: loading it and identifying it."""
