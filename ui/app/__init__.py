"""The Gradio app: one model, its adapters, one store and a queue of jobs."""
