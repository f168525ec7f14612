"""A tiny model with its prompt format, loaded once for the whole package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="package")
def tiny(tiny_base: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unlearner.tokens.prompts import prompt_format

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, use_safetensors=True)
    return model, prompt_format(AutoTokenizer.from_pretrained(tiny_base))
