"""Two answers to one question, token by token: the base beside the base with its adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evaluation.inference.generation import _Draw
from evaluation.protocols import Decoding
from unlearner.tokens.decoding import Prompt, stop_tokens

if TYPE_CHECKING:
    import torch

    from unlearner.tokens.prompts import PromptFormat

GREEDY_TEMPERATURE = 0.0
BASE_ROW = "__base__"  # PEFT's name for a row of a batch on which no adapter acts


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; temperature 0 is greedy, the default everywhere."""

    temperature: float = GREEDY_TEMPERATURE
    seed: int = 0
    max_new: int = 200


@dataclass
class _Side:
    """One answer in the making."""

    tokens: list[int] = field(default_factory=list)
    done: bool = False


class PairDecoder:
    """Decodes both sides one token a step, so that stopping takes a token at most.

    With one adapter on an unquantised base both sides are rows of one batch, where PEFT applies
    the adapter to the second row only. A stack of several, or a 4-bit base, is decoded in turns:
    PEFT's mixed batches know one adapter a row, and batch size changes 4-bit rounding.

    The prompts are those of the evaluation, and a seeded draw is the evaluation's draw.
    With `right_only` the base's side has ended before it began: only the stack answers.
    """

    def __init__(
        self,
        model: Any,
        fmt: PromptFormat,
        question: str,
        stack: Sequence[str],
        sampling: Sampling,
        *,
        quantised: bool = False,
        mixed: bool | None = None,
        right_only: bool = False,
    ) -> None:
        """`mixed` forces one way or the other, for comparing them."""
        prompt = fmt.encode_prompt(question)
        self.model, self.fmt = model, fmt
        self.stack = list(stack)
        self.sides = (_Side(done=right_only), _Side())
        self.one_batch = (len(self.stack) == 1 and not quantised) if mixed is None else mixed
        self.one_batch = self.one_batch and not right_only
        self.budget = sampling.max_new
        self._prompt = prompt
        self.stops = set(stop_tokens(model, fmt))
        self._caches: list[Any] = []
        self._draws = self._processors(prompt, sampling)

    @staticmethod
    def _processors(prompt: list[int], sampling: Sampling) -> list[Any]:
        if sampling.temperature <= 0:
            return []
        decoding = Decoding(
            "app",
            max_new=sampling.max_new,
            sample=True,
            temperature=sampling.temperature,
            seed=sampling.seed,
        )
        return [_Draw(decoding, [Prompt(prompt, sampling.max_new)]) for _ in range(2)]

    @property
    def done(self) -> bool:
        """Whether both answers have ended or reached their budget."""
        return all(side.done for side in self.sides)

    @property
    def texts(self) -> tuple[str, str]:
        """Both answers so far, without special tokens."""
        made = self.fmt.tokenizer.batch_decode(
            [side.tokens for side in self.sides],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return made[0].strip(), made[1].strip()

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of both answers so far."""
        return len(self.sides[0].tokens), len(self.sides[1].tokens)

    def step(self) -> None:
        """One token more for every side that has not ended."""
        import torch

        if self.done:
            return
        # Entered again on every step: the pieces of a stream may run on different threads, and
        # torch keeps this switch for each thread.
        with torch.inference_mode():
            logits = self._both() if self.one_batch else self._in_turns()
        for number, side in enumerate(self.sides):
            if not side.done:
                self._take(number, side, logits[number])

    def _take(self, number: int, side: _Side, scores: torch.Tensor) -> None:
        if self._draws:
            scores = self._draws[number](None, scores[None])[0]
        token = int(scores.argmax())
        if token in self.stops:
            side.done = True
            return
        side.tokens.append(token)
        side.done = len(side.tokens) >= self.budget

    def _both(self) -> list[torch.Tensor]:
        """Next-token scores of both rows of one batch; an ended row goes on unread."""
        rows = [
            self._prompt if not self._caches else [side.tokens[-1] if side.tokens else 0]
            for side in self.sides
        ]
        names = [BASE_ROW, self.stack[0]]
        out = self._forward(rows, adapter_names=names)
        return [out[0], out[1]]

    def _in_turns(self) -> list[Any]:
        from adapters.lora.stack import base_only

        found: list[Any] = [None, None]
        first = not self._caches
        if first:
            self._caches = [None, None]
        for number, side in enumerate(self.sides):
            if side.done:
                continue
            ids = self._prompt if first else [side.tokens[-1]]
            if number == 0 and self.stack:
                with base_only(self.model):
                    found[0] = self._forward([ids], side=0)[0]
            else:
                found[number] = self._forward([ids], side=number)[0]
        return found

    def _forward(self, rows: list[list[int]], side: int = 0, **options: Any) -> torch.Tensor:
        """Scores [rows, vocabulary] of the next token, float32."""
        import torch

        cache = self._caches[side] if self._caches else None
        device = next(self.model.parameters()).device
        out = self.model(
            input_ids=torch.tensor(rows, device=device),
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        if self._caches:
            self._caches[side] = out.past_key_values
        else:
            self._caches = [out.past_key_values]
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits
