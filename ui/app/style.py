"""The look of the app: one accent, system fonts, light and dark by the reader's system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from evaluation.report.plots import colour_css

HERE = Path(__file__).parent


def page_css() -> str:
    """The style sheet, with the colours of both schemes."""
    rules = (HERE / "page.css").read_text(encoding="utf-8")
    return f"{colour_css()}\n{colour_css('.dark', dark=True)}\n{rules}"


def page_head() -> str:
    """What the page does by itself, as a script of its head."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return f'<script type="module">{script}</script>'


def theme() -> Any:
    """Neutral, one accent, fonts of the system: nothing is fetched."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    accent = gr.themes.Color(
        "#eef5fa", "#d9e9f4", "#b5d3e8", "#8fc7ee", "#4f97c6", "#1f5f8b", "#1b5680", "#174a6d",
        "#123b57", "#0e2f46", "#0a2234", name="unlearner",
    )  # fmt: skip
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return gr.themes.Default(
        primary_hue=accent, neutral_hue="slate", font=fonts, font_mono=mono
    ).set(
        button_primary_background_fill="#1f5f8b",
        button_primary_background_fill_dark="#1f5f8b",
        button_primary_background_fill_hover="#174a6d",
        button_primary_background_fill_hover_dark="#2a76ab",
        checkbox_background_color_selected_dark="#2a76ab",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )
