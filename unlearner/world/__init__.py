"""The embedded world: fictitious authors with the TOFU schema, generated from a seed."""
