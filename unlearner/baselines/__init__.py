"""Models to compare with: Origin and Retrain, full fine-tuning, tiny Llamas."""
