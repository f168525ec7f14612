"""The forwards of one micro-batch, each run at most once and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adapters.environment import evaluating
from adapters.lora.stack import parents_only
from unlearner.objectives.hidden import block_states, steered_layer
from unlearner.objectives.likelihood import (
    AnswerHidden,
    AnswerNLL,
    Answers,
    answer_nll,
    answers,
    per_token,
)
from unlearner.objectives.sequence import AnswerTokens, token_kl
from unlearner.tokens.batch_plan import TAUGHT

# A batch's tensor of reference NLLs of a stream, where they were computed before.
REFERENCE = "reference_{}"


def part_of_batch(batch: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Rows `start` to `stop` of a padded batch or a pack, as a batch of the same kind."""
    if "starts" not in batch:
        names = ("input_ids", "attention_mask", "labels")
        return {name: batch[name][start:stop] for name in names}
    first, last = int(batch["starts"][start]), int(batch["starts"][stop])
    names = ("input_ids", "position_ids", "labels")
    part = {name: batch[name][:, first:last] for name in names}
    part["row_of_token"] = batch["row_of_token"][:, first:last] - start
    part["starts"] = batch["starts"][start : stop + 1] - first
    return part


def rows_of_batch(batch: Mapping[str, Tensor]) -> int:
    """How many rows a padded batch or a pack has."""
    if "starts" in batch:
        return int(batch["starts"].shape[0]) - 1
    return int(batch["input_ids"].shape[0])


def of_streams(
    batch: Mapping[str, Tensor], streams: Sequence[str], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """The batch with the rows of `wanted` alone, which stand together in `streams`."""
    size = rows_of_batch(batch) // len(streams)
    start = streams.index(wanted[0]) * size
    rows = part_of_batch(batch, start, start + len(wanted) * size)
    by_pair = [n for n in batch if n in TAUGHT or n.startswith(REFERENCE.format(""))]
    return rows | {name: batch[name] for name in by_pair}


class StepForwards:
    """What an objective asks of the model for the rows of a micro-batch (`losses.Forwards`).

    All streams of the model in training share one forward. The reference is the stack without the
    new adapter: its NLLs were computed before training, or come from a forward of the stream that
    asks, without gradient.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Tensor],
        streams: Sequence[str],
        parents: Sequence[str] = (),
        bare: torch.nn.Module | None = None,
        seed: int = 0,
        frozen: torch.nn.Module | None = None,
    ) -> None:
        """Takes the batch, whose rows stand stream by stream, equally many of each.

        Args:
            model: what is trained, DDP around it or not.
            batch: from `pad_batch` or `pack_rows`, perhaps with references of its rows.
            streams: names in the order of the rows.
            parents: names of the adapters the new one is trained on top of.
            bare: the PeftModel inside `model`, where the two are not the same.
            seed: of what an objective draws once and for all.
            frozen: a copy of the model as it was, where all weights train and none can be
                switched off; it is the reference then.
        """
        self._frozen = frozen
        self.seed = seed
        self._model = model
        self._bare: Any = model if bare is None else bare
        self._parents = tuple(parents)
        self._batch = batch
        self._streams = tuple(streams)
        self._size = rows_of_batch(batch) // len(self._streams)
        self._steered: AnswerHidden | None = None

    @cached_property
    def _all(self) -> Answers:
        return answers(self._model, self._batch)

    @cached_property
    def _nll(self) -> AnswerNLL:
        return self._all.nll()

    def _span(self, stream: str) -> tuple[int, int]:
        start = self._streams.index(stream) * self._size
        return start, start + self._size

    def answers(self, stream: str) -> Answers:
        """A stream's answer positions under the model in training."""
        return self._all.rows(*self._span(stream))

    def nll(self, stream: str) -> AnswerNLL:
        """Summed NLL of a stream's rows under the model in training."""
        found, (start, stop) = self._nll, self._span(stream)
        return AnswerNLL(found.nll[start:stop], found.n[start:stop])

    def reference_nll(self, stream: str) -> AnswerNLL:
        """Summed NLL of a stream's rows before this request."""
        known = self._batch.get(REFERENCE.format(stream))
        if known is not None:
            start, stop = self._span(stream)
            return AnswerNLL(known, self._all.at.n[start:stop])
        found: AnswerNLL = self._reference(stream, answer_nll)
        return found

    def reference_kl(self, stream: str) -> Tensor:
        """KL(reference || model) a row, mean over its answer positions, (rows,)."""
        found = self.tokens_and_reference(stream, lambda mine, theirs, y: token_kl(mine, theirs))
        return found.by_row.per_token

    def tokens(self, stream: str, value: Callable[[Tensor, Tensor], Tensor]) -> AnswerTokens:
        """`value(logits, targets)` of every answer token of a stream."""
        mine = self.answers(stream)

        def of_chunk(logits: Tensor, part: slice) -> Tensor:
            return value(logits, mine.at.targets[part])

        return AnswerTokens(per_token(mine.at.hidden, mine.head, of_chunk), mine.at)

    def tokens_and_reference(
        self, stream: str, value: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> AnswerTokens:
        """`value(logits, logits of the reference, targets)` of every answer token of a stream."""
        mine = self.answers(stream)
        theirs = self._reference(stream, answers)

        def of_chunk(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                reference = theirs.head(theirs.at.hidden[part])
            return value(logits, reference, mine.at.targets[part])

        return AnswerTokens(per_token(mine.at.hidden, mine.head, of_chunk), mine.at)

    def states(self, stream: str, layer: int) -> AnswerHidden:
        """What a block puts out at a stream's answer positions; one forward for all streams."""
        return self._states(layer).rows(*self._span(stream))

    def reference_states(self, stream: str, layer: int) -> AnswerHidden:
        """The same before this request, without gradient."""
        found: AnswerHidden = self._reference(stream, lambda m, b: self._block(m, b, layer))
        return found

    def _states(self, layer: int) -> AnswerHidden:
        if self._steered is None:
            self._steered = self._block(self._model, self._batch, layer)
        return self._steered

    @staticmethod
    def _block(model: torch.nn.Module, batch: Mapping[str, Tensor], layer: int) -> AnswerHidden:
        return block_states(model, batch, steered_layer(model, layer))

    def _reference(self, stream: str, read: Callable[[Any, Mapping[str, Tensor]], Any]) -> Any:
        part = part_of_batch(self._batch, *self._span(stream))
        model = self._bare if self._frozen is None else self._frozen
        with evaluating(model), parents_only(model, self._parents):
            return read(model, part)
