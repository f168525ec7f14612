"""One adapter of a stack at many strengths, on one loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from adapters.lora.stack import activate
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.inference.scoring import OnProgress, silent
from evaluation.logs.records import SETS, EvalLog
from evaluation.suite import EvalData, evaluate, load_eval_data
from unlearner.request.formats import Columns
from unlearner.request.rows import Row
from unlearner.request.sources import rows_named
from unlearner.request.tofu import load_split
from unlearner.tokens.prompts import PromptFormat

# Retain rows scored at every scale; their answers alone, as a sign of what is lost.
RETAIN_ROWS = 100
# What is attached to the adapter besides the curve.
WORDS = (
    "kind", "schema", "split", "protocol", "limit", "by", "max_mu_loss", "chosen_scale",
    "published", "best_by_gap", "best_by_ks", "tried", "seconds",
)  # fmt: skip


def stack_of(store: AdapterStore, ref: str) -> tuple[str, dict[str, float]]:
    """The adapter's slug, and the stack it is measured in: scales by slug, in order.

    The active stack where the adapter is part of it, else its parents as they were when it was
    trained, and the adapter at their end.

    Raises:
        UserError: active adapters were trained on top of it.
    """
    adapter = store.get(ref)
    slug = adapter.slug
    active = {each.slug: each.scale for each in store.active()}
    above = [s for s in active if slug in store.catalog.parents_of(s)[0]]
    if above:
        raise UserError(
            f"{above[0]} was trained on top of {slug}: at another strength it would be "
            "another adapter than the one that was trained.",
            f"Calibrate {above[-1]}, or revert it first.",
        )
    if slug in active:
        return slug, active
    manifest = adapter.manifest
    parents = {parent: manifest.parent_scales.get(parent, 1.0) for parent in manifest.parents}
    return slug, parents | {slug: 1.0}


def calibration_data(
    split: str | None, rows: str | None, data: Path | None, columns: Columns | None = None
) -> EvalData:
    """TOFU's four sets with the forget rows of a split, or of `rows` (see `rows_named`).

    Raises:
        UserError: rows of the file without paraphrased and perturbed answers.
    """
    if rows is None:
        return load_eval_data(str(split), data)
    forget = rows_named(rows, data, columns=columns)
    bare = [row for row in forget if row.paraphrased_answer is None or not row.perturbed_answers]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(forget)} rows of {rows} have no paraphrased or no perturbed "
            f"answers, for example {bare[0].question!r}.",
            "Add paraphrased_answer and perturbed_answer to every row: log R needs them.",
        )
    return EvalData(forget, *(load_split(f"{name}_perturbed", data) for name in SETS[1:]))


@dataclass(frozen=True)
class Sweep:
    """A model with a stack whose adapter `slug` takes every strength in turn.

    Attributes:
        model: PeftModel with all of `stack` attached under their slugs.
        fmt: prompts and tokenizer.
        data: the four sets.
        retain_log: of a model that never saw the forget set.
        slug: the adapter that is scaled.
        stack: scales by slug, in order; that of `slug` is replaced.
        identity: digest of base and how it is loaded, for the cache.
        protocol, limit, resume_dir: as in `evaluation.suite.evaluate`.
        on_progress: gets the scale in its label.
    """

    model: Any
    fmt: PromptFormat
    data: EvalData
    retain_log: EvalLog
    slug: str
    stack: Mapping[str, float]
    identity: str
    protocol: str
    limit: int | None = None
    resume_dir: Path | None = None
    on_progress: OnProgress = silent

    @property
    def probe_retain(self) -> list[Row]:
        """The retain rows that are scored at every scale, their true answers only."""
        first = self.data.retain[: self.limit][:RETAIN_ROWS]
        return [Row(row.question, row.answer) for row in first]

    def look(self, scale: float) -> EvalLog:
        """Scores of the forget rows and of some retain rows at `scale`, no answers."""
        return self._log(scale, EvalData(self.data.forget, self.probe_retain), generate=False)

    def measure(self, scale: float) -> EvalLog:
        """The whole evaluation at `scale`; forget scores that `look` kept are used again."""
        return self._log(scale, self.data, generate=True)

    def _log(self, scale: float, data: EvalData, *, generate: bool) -> EvalLog:
        scales = {**self.stack, self.slug: scale}
        activate(self.model, list(scales), scales)
        return evaluate(
            self.model,
            self.fmt,
            data,
            protocol=self.protocol,
            retain_log=self.retain_log,
            limit=self.limit,
            generate=generate,
            key=key_of(model=self.identity, stack=list(scales.items())),
            resume_dir=self.resume_dir,
            on_progress=lambda text, *n: self.on_progress(f"scale {scale:g}, {text}", *n),
            meta={"adapters": [list(pair) for pair in scales.items()]},
        )


def flat(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """A calibration as numbers, flags and words for `AdapterStore.attach_eval`: columns, no rows.

    Sentences stay in the calibration's own file.
    """
    curve = calibration["curve"]
    return {
        **{word: calibration[word] for word in WORDS},
        "curve": {name: [point[name] for point in curve] for name in curve[0]},
        "held_out": calibration["held_out"],
    }
