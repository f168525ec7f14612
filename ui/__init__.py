"""Every word a person sees: the command line and the app."""
