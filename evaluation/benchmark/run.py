"""A standard implementation beside this one: FLOPs on any shape, time and memory on this machine.

The standard implementation ("plain") does what the released code does: rows padded to 500
(training) and 200 (evaluation) tokens, separate forwards for forget and retain rows, logits of
every position, evaluation batches in the order of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.benchmark import flops
from evaluation.benchmark.shapes import SHAPES, new_llama, with_lora
from evaluation.inference.prefix_sharing import TREE_TOKENS, build_tree, packs_of
from evaluation.inference.scoring import encode_answers
from unlearner.config import make_config
from unlearner.tokens.batch_plan import plan_steps
from unlearner.tokens.prompts import Encoded, PromptFormat, Template

if TYPE_CHECKING:
    from unlearner.request.rows import Row

PAIRS = 8
PLAIN_DECODE = 30
# Size of a tokenizer that is trained where none is given.
OWN_VOCABULARY = 4096
# One in this many packs of trees is counted; the others follow by their size.
SAMPLE = 8


@dataclass(frozen=True)
class Workload:
    """The rows of a forget05 request and of an evaluation, as tokens.

    With a tokenizer of its own also the format of its prompts, and the rows of TOFU's sets.
    """

    source: str
    forget: list[Encoded]
    retain: list[Encoded]
    questions: list[list[Encoded]]
    fmt: PromptFormat | None = None
    sets: Mapping[str, list[Row]] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """One figure of both implementations, and how many times better ours is."""

    name: str
    unit: str
    plain: float | None
    ours: float | None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The line as a JSON object."""
        return asdict(self)

    def under(self, heading: str) -> Line:
        """The line with `heading` before its name."""
        return replace(self, name=f"{heading}{self.name}")


def load_workload(
    data: Path | None,
    tokenizer: str | None,
    template: Template = "auto",
    system: str | None = None,
) -> Workload:
    """TOFU's rows of `data` as tokens of `tokenizer`; without `data` the embedded world's.

    `template` and `system` are those of `prompt_format`. The default tokenizer is a BPE trained on
    the rows themselves, so that nothing is downloaded.

    Raises:
        UserError: a tokenizer without data.
    """
    from adapters.base.load import load_tokenizer
    from unlearner.request.tofu import load_split
    from unlearner.tokens.prompts import encode_rows, prompt_format

    if data is None:
        if tokenizer is not None:
            raise UserError("A tokenizer is given, but no rows to encode.", "Add --data.")
        return _world_workload()
    forget, retain = (load_split(name, data) for name in ("forget05", "retain95"))
    if tokenizer is None:
        fmt = _trained_format([*forget, *retain], OWN_VOCABULARY)
        source = f"TOFU forget05, {OWN_VOCABULARY} tokens trained on it"
    else:
        fmt = prompt_format(load_tokenizer(tokenizer), template, system)
        source = "TOFU forget05"
    sizes = {"forget05": 200, "retain": 300, "real_authors": 100, "world_facts": 117}
    sets = {name: load_split(f"{name}_perturbed", data)[:n] for name, n in sizes.items()}
    evaluated = [row for rows in sets.values() for row in rows]
    trained = [
        encode_rows(fmt, [(row.question, row.answer) for row in rows], flops.PLAIN_TRAIN, source)
        for rows in (forget, retain)
    ]
    questions = [list(row.texts) for row in encode_answers(fmt, evaluated)]
    return Workload(source, trained[0], trained[1], questions, fmt, sets)


def _world_workload() -> Workload:
    from unlearner.world.build import build_world

    rows = [row for author in build_world(0).authors for row in author.rows]
    encoded = encode_answers(_trained_format(rows, 1500), rows)
    cut = max(8, len(rows) // 20)
    answers = [row.answer for row in encoded]
    questions = [list(row.texts) for row in encoded[: 4 * cut]]
    return Workload("embedded world", answers[:cut], answers[cut:], questions)


def _trained_format(rows: Sequence[Row], size: int) -> PromptFormat:
    from unlearner.baselines.tiny_llama import train_tokenizer

    texts = [f"{row.question} {row.answer}" for row in rows]
    return PromptFormat(train_tokenizer(texts, size), "llama2")


def count(work: Workload, shape: str, rank: int = 16) -> list[Line]:
    """FLOPs of a whole request and of its scores on `shape`, by torch's counter on meta tensors.

    One micro-batch and every eighth pack of trees are counted; the others follow by their tokens.

    Args:
        work: the rows.
        shape: one of `shapes.SHAPES`.
        rank: of the LoRA.
    """
    full = new_llama(shape)
    plain_row, plain_text = flops.plain_training_row(full), flops.plain_scoring_row(full)
    # A missing paraphrase is scored again.
    plain = float(sum(max(len(texts), 5) for texts in work.questions) * plain_text.flops)
    model = with_lora(full, rank)
    # The targets are those of the published model's shape.
    goal = 1.0 if shape == "llama2-7b" else 0.0
    sizes = [len(build_tree(texts).tokens) for texts in work.questions]
    packs = packs_of(work.questions, TREE_TOKENS)[::SAMPLE]
    counted = sum(flops.scoring(model, [work.questions[i] for i in pack]).flops for pack in packs)
    trees = counted / sum(sizes[i] for pack in packs for i in pack) * sum(sizes)
    scored = _line("teacher-forced FLOPs", plain, trees, 6.0 * goal)
    return [*_training(model, work, plain_row, shape, goal), scored]


def _training(
    model: Any, work: Workload, plain_row: flops.Counted, shape: str, goal: float
) -> list[Line]:
    """FLOPs of a request, and bytes saved for backward, without and with checkpointing."""
    steps = plan_steps(len(work.forget), len(work.retain), 0, make_config().train)
    pairs = [pair for step in steps for pair in step]
    rows = [row for p in pairs for row in (work.forget[p.forget], work.retain[p.retain])]
    some = rows[: 2 * PAIRS]
    here, tokens = (sum(len(row.input_ids) for row in part) for part in (some, rows))
    whole = flops.training_step(model, some, packed=True)
    again = flops.training_step(model, some, packed=True, checkpointing="all")
    plain = float(len(rows) * plain_row.flops)
    layers = SHAPES[shape][2]
    saved = [part.saved_bytes / here / layers / 1e3 for part in (whole, again)]
    plain_saved = plain_row.saved_bytes / flops.PLAIN_TRAIN / layers / 1e3
    official = (
        "plain is the official full fine-tune, checkpointed; ours is LoRA without checkpointing: "
        "the next line compares both with it"
    )
    return [
        _line(
            "training FLOPs of one job", plain, whole.flops / here * tokens, 13.5 * goal, official
        ),
        _line(
            "the same with full checkpointing", plain, again.flops / here * tokens, 9.0 * goal
        ),
        Line(
            "saved for backward, per token and layer", "kB", plain_saved, saved[1],
            plain_saved / saved[1], note="both checkpointed; plain includes its logits",
        ),
        Line(
            "the same, ours without checkpointing", "kB", None, saved[0], note="without autocast"
        ),
    ]  # fmt: skip


def _line(name: str, plain: float, ours: float, at_least: float = 0.0, note: str = "") -> Line:
    """FLOPs in peta, with a target where there is one."""
    ratio, unit = plain / ours, "PFLOP"
    plain, ours = plain / 1e15, ours / 1e15
    if not at_least:
        return Line(name, unit, plain, ours, ratio, note=note)
    return Line(name, unit, plain, ours, ratio, f"at least {at_least:g} x", ratio >= at_least, note)
