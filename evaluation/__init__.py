"""Measures a base with its active stack, or merged weights: what is forgotten, what is retained.

`evaluate`, `answer`, `read_log` and `EvalResult` are the Python API, see docs/python.md. They are
imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.api import EvalResult as EvalResult
    from evaluation.api import answer as answer
    from evaluation.api import evaluate as evaluate
    from evaluation.logs import read_log as read_log

__all__ = ["EvalResult", "answer", "evaluate", "read_log"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'evaluation' has no attribute {name!r}")
    from importlib import import_module

    return getattr(
        import_module("evaluation.logs" if name == "read_log" else "evaluation.api"), name
    )
