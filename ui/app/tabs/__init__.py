"""One file per tab of the app; the only modules that import gradio."""
