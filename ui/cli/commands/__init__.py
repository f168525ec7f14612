"""The commands, by section of the help."""
