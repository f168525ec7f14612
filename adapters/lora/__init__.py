"""LoRA adapters: files, the live stack, combination, merging and export."""
