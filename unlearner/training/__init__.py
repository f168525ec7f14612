"""Training one forget adapter."""
