"""What the tabs show, as plain data. Nothing here imports gradio."""
