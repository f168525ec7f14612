"""A standard implementation beside this one: FLOPs on any shape, time and memory on this machine.

The standard implementation ("plain") does what the released code does: rows padded to 500
(training) and 200 (evaluation) tokens, separate forwards for forget and retain rows, logits of
every position, evaluation batches in the order of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.errors import UserError
from evaluation.benchmark import flops
from evaluation.benchmark.shapes import SHAPES, new_llama, with_lora
from evaluation.inference.generation import BATCH_SIZE, LEAVE
from unlearner.config import make_config
from unlearner.tokens.batch_plan import plan_steps
from unlearner.tokens.prompts import Encoded, PromptFormat

if TYPE_CHECKING:
    from evaluation.logs.records import EvalLog
    from unlearner.request.rows import Row

PAIRS = 8
PLAIN_DECODE = 30
# Size of a tokenizer that is trained where none is given.
OWN_VOCABULARY = 4096
# One in this many packs of trees is counted; the others follow by their size.
SAMPLE = 8


@dataclass(frozen=True)
class Workload:
    """The rows of a forget05 request and of an evaluation, as tokens."""

    source: str
    forget: list[Encoded]
    retain: list[Encoded]
    questions: list[list[Encoded]]


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


def load_workload(data: Path | None, tokenizer: str | None) -> Workload:
    """TOFU's rows of `data` as tokens of `tokenizer`; without `data` the embedded world's.

    The default tokenizer is a BPE trained on the rows themselves, so that nothing is downloaded.

    Raises:
        UserError: a tokenizer without data.
    """
    from evaluation.inference.scoring import encode_answers
    from unlearner.request.tofu import load_split
    from unlearner.tokens.prompts import encode_rows, prompt_format

    if data is None:
        if tokenizer is not None:
            raise UserError("A tokenizer is given, but no rows to encode.", "Add --data.")
        return _world_workload()
    source = "TOFU forget05"
    if tokenizer is None:
        from unlearner.baselines.tiny_llama import train_tokenizer

        names = ("forget05", "retain95")
        rows = [row for name in names for row in load_split(name, data)]
        texts = [f"{row.question} {row.answer}" for row in rows]
        fmt = PromptFormat(train_tokenizer(texts, OWN_VOCABULARY), "llama2")
        source += f", {OWN_VOCABULARY} tokens trained on it"
    else:
        from adapters.base.load import load_tokenizer

        fmt = prompt_format(load_tokenizer(tokenizer))
    sets = [("forget05", 200), ("retain", 300), ("real_authors", 100), ("world_facts", 117)]
    asked = [row for name, n in sets for row in load_split(f"{name}_perturbed", data)[:n]]

    def train(split: str) -> list[Encoded]:
        pairs = [(row.question, row.answer) for row in load_split(split, data)]
        return encode_rows(fmt, pairs, flops.PLAIN_TRAIN, split)

    questions = [list(row.texts) for row in encode_answers(fmt, asked)]
    return Workload(source, train("forget05"), train("retain95"), questions)


def _world_workload() -> Workload:
    from evaluation.inference.scoring import encode_answers
    from unlearner.baselines.tiny_llama import train_tokenizer
    from unlearner.world.build import build_world

    world = build_world(0)
    rows: Sequence[Row] = [row for author in world.authors for row in author.rows]
    texts = [f"{row.question} {row.answer}" for row in rows]
    fmt = PromptFormat(train_tokenizer(texts, 1500), "llama2")
    encoded = encode_answers(fmt, rows)
    cut = max(8, len(rows) // 20)
    plain = [row.answer for row in encoded]
    return Workload(
        "embedded world", plain[:cut], plain[cut:], [list(row.texts) for row in encoded[: 4 * cut]]
    )


def count(
    work: Workload, shape: str, rank: int = 16, answers: Sequence[Answer] | None = None
) -> list[Line]:
    """FLOPs of a whole request and evaluation on `shape`, by torch's counter on meta tensors.

    One micro-batch and every eighth pack of trees are counted; the others follow by their tokens.

    Args:
        work: the rows.
        shape: one of `shapes.SHAPES`.
        rank: of the LoRA.
        answers: lengths of recorded answers; by default of the true ones, none known beforehand.
    """
    full = new_llama(shape)
    plain_row = flops.plain_training_row(full)
    plain_eval = float(
        # A missing paraphrase is scored again.
        sum(max(len(q), 5) for q in work.questions) * flops.plain_scoring_row(full).flops
    )
    lengths = answer_lengths(work) if answers is None else answers
    generated = decode_flops(lengths, flops.decoding_token(full, 60).flops)
    said = "answers as long as the true ones, none known beforehand"
    if answers is not None:
        known = sum(a.agreed for a in lengths) / sum(a.made for a in lengths)
        said = f"answers as recorded, {known:.0%} of their tokens known from scoring"
    model = with_lora(full, rank)
    # The targets are those of the published model's shape.
    goal = 1.0 if shape == "llama2-7b" else 0.0
    trees = _trees(model, work)
    scored = _line("teacher-forced FLOPs", plain_eval, trees, 6.0 * goal)
    in_all = plain_eval + generated[0], trees + generated[1]
    whole = _line("evaluation FLOPs in all", *in_all, 5.5 * goal, said)
    return [*_training(model, work, plain_row, shape, goal), scored, whole]


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
    kept = [part.saved_bytes / here / layers / 1e3 for part in (whole, again)]
    plain_kept = plain_row.saved_bytes / flops.PLAIN_TRAIN / layers / 1e3
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
            "saved for backward, per token and layer", "kB", plain_kept, kept[1],
            plain_kept / kept[1], note="both checkpointed; plain includes its logits",
        ),
        Line(
            "the same, ours without checkpointing", "kB", None, kept[0], note="without autocast"
        ),
    ]  # fmt: skip


def _line(name: str, plain: float, ours: float, at_least: float = 0.0, note: str = "") -> Line:
    """FLOPs in peta, with a target where there is one."""
    ratio, unit = plain / ours, "PFLOP"
    plain, ours = plain / 1e15, ours / 1e15
    if not at_least:
        return Line(name, unit, plain, ours, ratio, note=note)
    return Line(name, unit, plain, ours, ratio, f"at least {at_least:g} x", ratio >= at_least, note)


def _trees(model: Any, work: Workload) -> float:
    from evaluation.inference.prefix_sharing import TREE_TOKENS, build_tree, packs_of

    sizes = [len(build_tree(texts).tokens) for texts in work.questions]
    packs = packs_of(work.questions, TREE_TOKENS)
    counted = packs[::SAMPLE]
    seen = sum(sizes[i] for pack in counted for i in pack)
    total = sum(
        flops.scoring(model, [work.questions[i] for i in pack], 1 << 30).flops for pack in counted
    )
    return total / seen * sum(sizes)


class Answer(NamedTuple):
    """Lengths in tokens: prompt, true answer, the model's answer, and the start these two share."""

    prompt: int
    truth: int
    made: int
    agreed: int


def answer_lengths(work: Workload) -> list[Answer]:
    """Answers as long as the true ones, with no token known from scoring."""
    first = [texts[0] for texts in work.questions]
    return [Answer(t.n_prompt, t.n_targets, t.n_targets, 0) for t in first]


def recorded_answers(log: EvalLog, tokenizer: str) -> list[Answer]:
    """Lengths of a recorded model's answers, and how much of each is the true one.

    Raises:
        UserError: no row of the log holds question, answer and a generated text.
    """
    from adapters.base.load import load_tokenizer
    from unlearner.tokens.prompts import prompt_format

    fmt = prompt_format(load_tokenizer(tokenizer))
    found = []
    for row in (row for part in log.sets.values() for row in part.rows):
        text = next((made.text for made in row.generations.values() if made.text), None)
        if row.question is None or row.answer is None or text is None:
            continue
        truth, made = (fmt.encode(row.question, words) for words in (row.answer, text))
        pairs = zip(_answer_of(truth), _answer_of(made), strict=False)
        agreed = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if agreed is None:
            agreed = min(truth.n_targets, made.n_targets)
        found.append(Answer(truth.n_prompt, truth.n_targets, made.n_targets, agreed))
    if not found:
        raise UserError("The log holds no generated answers.", "Take a log with its texts.")
    return found


def _answer_of(text: Encoded) -> list[int]:
    return text.input_ids[text.n_prompt :]


def decode_flops(answers: Sequence[Answer], per_token: float) -> tuple[float, float]:
    """FLOPs of generation: plain (batches of 30 in the order of the data), and ours.

    A plain batch runs until its longest answer ends; in both, prompts are padded to the longest of
    the batch. Ours starts after the tokens that scoring has shown to agree with the true answer,
    skips answers that agree to their end, sorts by prompt and drops rows that ended.
    """

    def slots(order: Sequence[tuple[int, int]], size: int) -> int:
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return sum(len(b) * (max(p for p, _ in b) + max(n for _, n in b)) for b in batches)

    plain = slots([(a.prompt, a.made) for a in answers], PLAIN_DECODE)
    left = [a for a in answers if a.agreed < a.made]
    left.sort(key=lambda a: (a.prompt + a.agreed, a.truth), reverse=True)
    ours = sum(_our_slots(left[i : i + BATCH_SIZE]) for i in range(0, len(left), BATCH_SIZE))
    return plain * per_token, ours * per_token


def _our_slots(batch: Sequence[Answer]) -> int:
    """Token slots of one of our batches: its prompts, then every step of the rows left."""
    total = len(batch) * max(a.prompt + a.agreed for a in batch)
    lengths = [a.made - a.agreed for a in batch]
    held = len(batch)
    for step in range(1, max(lengths)):
        alive = sum(length > step for length in lengths)
        if held - alive >= max(1, LEAVE * held):
            held = alive
        total += held
    return total
