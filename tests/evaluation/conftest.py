"""A tiny model with its prompt format, loaded once for the whole package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module", autouse=True)
def _short_runs(
    request: pytest.FixtureRequest, shorten_answers: Any, ask_less: Any
) -> Iterator[None]:
    """Few tokens everywhere but where decoding itself is tested."""
    with pytest.MonkeyPatch.context() as patch:
        if not {"inference", "test_sampling.py"} & set(request.path.parts):
            shorten_answers(patch)
            ask_less(patch)
        yield


@pytest.fixture(scope="package")
def tiny(tiny_base: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unlearner.tokens.prompts import prompt_format

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, use_safetensors=True)
    return model, prompt_format(AutoTokenizer.from_pretrained(tiny_base))
