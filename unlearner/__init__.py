"""Turns a forget request into an adapter: data, prompts, objectives, training.

`forget`, `load_base`, `load_adapter` and `Request` are the Python API, see docs/python.md. They are
imported on first use, so that `import unlearner` needs no model library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlearner.api import Base as Base
    from unlearner.api import ForgetAdapter as ForgetAdapter
    from unlearner.api import Request as Request
    from unlearner.api import forget as forget
    from unlearner.api import load_adapter as load_adapter
    from unlearner.api import load_base as load_base

__all__ = ["Base", "ForgetAdapter", "Request", "forget", "load_adapter", "load_base"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'unlearner' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("unlearner.api"), name)
