"""vLLM as an optional engine for greedy answers. Scores stay with our own forward.

vLLM runs one adapter at a time and leaves out its prefix cache where prompts are scored, so it is
of use for generation only. Not run by us yet: it needs a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from evaluation.inference.generation import Prompt

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class VllmEngine:
    """Greedy answers from vLLM, for a base folder and at most one adapter folder."""

    def __init__(self, base: Path, adapter: Path | None = None, rank: int = 16) -> None:
        """Loads the model.

        Args:
            base: folder of the base, or of merged weights.
            adapter: folder of one adapter, a stack summed up by `adapters export --format vllm`.
            rank: of that adapter.

        Raises:
            UserError: vLLM is not installed, or the rank is beyond what it takes.
        """
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "The engine vllm needs the package vllm.",
                "Install it beside a GPU, or leave out --engine.",
            )
        import vllm

        self._vllm: Any = vllm
        self._adapter = adapter
        settings: dict[str, Any] = {}
        if adapter is not None:
            fitting = [r for r in RANKS if r >= rank]
            if not fitting:
                raise UserError(
                    f"vLLM takes ranks up to {RANKS[-1]}, the adapter has {rank}.",
                    "Truncate it with `unlearner adapters combine --rank`.",
                )
            settings = {"enable_lora": True, "max_lora_rank": fitting[0]}
        self._model = vllm.LLM(model=str(base), **settings)

    def __call__(self, prompts: Sequence[Prompt], stops: Sequence[int]) -> list[list[int]]:
        """Tokens of every answer, the one that ends it left out."""
        request = None
        if self._adapter is not None:
            from vllm.lora.request import LoRARequest

            request = LoRARequest("unlearned", 1, str(self._adapter))
        asked = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        settings = [
            self._vllm.SamplingParams(
                temperature=0.0,
                max_tokens=max(1, prompt.budget),
                stop_token_ids=list(stops),
                skip_special_tokens=False,
            )
            for prompt in prompts
        ]
        found = self._model.generate(asked, settings, lora_request=request, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]
