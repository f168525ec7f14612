"""The plain way beside ours, in one run: FLOPs counted on any shape, time and memory measured here.

The plain way is what the released code does: rows padded to 500 (training) and 200 (evaluation)
tokens, forget and retain in forwards of their own, logits of every position, evaluation batches in
the order of the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation import flops
from unlearner.config import make_config
from unlearner.pairing import plan_steps
from unlearner.prompts import Encoded, PromptFormat, pad_batch

if TYPE_CHECKING:
    import torch

    from unlearner.data import Row

PAIRS = 8
PLAIN_DECODE, OUR_DECODE = 30, 64
# Every so many-th pack of trees is counted, the others follow by their size.
SAMPLE = 8


@dataclass(frozen=True)
class Workload:
    """The rows of a forget05 job and of an evaluation, as tokens."""

    source: str
    forget: list[Encoded]
    retain: list[Encoded]
    questions: list[list[Encoded]]


@dataclass(frozen=True)
class Line:
    """One figure: the plain way's, ours, and how many times better ours is."""

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


def load_workload(data: Path | None, tokenizer: str | None) -> Workload:
    """TOFU's rows in the tokens of `tokenizer`, else the embedded world's in its own.

    Raises:
        UserError: only one of the two is given.
    """
    from evaluation.scoring import encode_answers
    from unlearner.data import load_split
    from unlearner.prompts import encode_rows, prompt_format

    if (data is None) != (tokenizer is None):
        raise UserError(
            "Real rows need both their folder and a tokenizer.", "Give --data and --tokenizer."
        )
    if data is None or tokenizer is None:
        return _world_workload()
    from adapters.base_model import load_tokenizer

    fmt = prompt_format(load_tokenizer(tokenizer))
    sets = [("forget05", 200), ("retain", 300), ("real_authors", 100), ("world_facts", 117)]
    asked = [row for name, n in sets for row in load_split(f"{name}_perturbed", data)[:n]]

    def train(split: str) -> list[Encoded]:
        pairs = [(row.question, row.answer) for row in load_split(split, data)]
        return encode_rows(fmt, pairs, flops.PLAIN_TRAIN, split)

    questions = [list(row.texts) for row in encode_answers(fmt, asked)]
    return Workload("TOFU forget05", train("forget05"), train("retain95"), questions)


def _world_workload() -> Workload:
    from evaluation.scoring import encode_answers
    from unlearner.tiny import train_tokenizer
    from unlearner.world import build_world

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


def count(work: Workload, shape: str, rank: int = 16) -> list[Line]:
    """FLOPs of the whole job and evaluation on `shape`, by torch's counter on meta tensors.

    Counted are a micro-batch of the plan and every eighth pack of trees; the rest of the plan
    follows by its tokens, which the tests hold against counting it all.
    """
    full = flops.new_llama(shape)
    plain_row = flops.plain_training_row(full)
    plain_scored = flops.plain_scoring_row(full)
    steps = plan_steps(len(work.forget), len(work.retain), 0, make_config().train)
    pairs = [pair for step in steps for pair in step]
    tokens = sum(
        len(work.forget[p.forget].input_ids) + len(work.retain[p.retain].input_ids) for p in pairs
    )
    texts = sum(max(len(q), 5) for q in work.questions)  # a missing paraphrase is scored again
    generated = decode_slots(work, flops.decoding_token(full, 60).flops)
    model = flops.with_lora(full, rank)
    some = [work.forget[p.forget] for p in pairs[:PAIRS]]
    some += [work.retain[p.retain] for p in pairs[:PAIRS]]
    here = sum(len(row.input_ids) for row in some)
    whole = flops.training_step(model, some, packed=True)
    again = flops.training_step(model, some, packed=True, checkpointing="all")
    trees = _trees(model, work)
    plain_job = 2.0 * len(pairs) * plain_row.flops
    plain_eval = float(texts * plain_scored.flops)
    peta = 1e15
    return [
        _line(
            "training FLOPs of one job", "PFLOP", plain_job / peta,
            whole.flops / here * tokens / peta, 13.5, note="official: full fine-tune, checkpointed",
        ),
        _line(
            "the same with full checkpointing", "PFLOP", plain_job / peta,
            again.flops / here * tokens / peta, 9.0,
        ),
        _line("teacher-forced FLOPs", "PFLOP", plain_eval / peta, trees / peta, 6.0),
        _line(
            "evaluation FLOPs in all", "PFLOP", (plain_eval + generated[0]) / peta,
            (trees + generated[1]) / peta, 5.5, note="answers as long as the true ones",
        ),
        _line(
            "saved for backward, a token and layer", "kB",
            plain_row.saved_bytes / flops.PLAIN_TRAIN / flops.SHAPES[shape][2] / 1e3,
            again.saved_bytes / here / flops.SHAPES[shape][2] / 1e3,
            note="both checkpointed; the plain way's holds its logits",
        ),
        Line(
            "the same, ours without checkpointing", "kB", None,
            whole.saved_bytes / here / flops.SHAPES[shape][2] / 1e3, note="without autocast",
        ),
    ]  # fmt: skip


def _line(
    name: str, unit: str, plain: float, ours: float, at_least: float | None = None, note: str = ""
) -> Line:
    ratio = plain / ours
    if at_least is None:
        return Line(name, unit, plain, ours, ratio, note=note)
    return Line(name, unit, plain, ours, ratio, f"at least {at_least:g} x", ratio >= at_least, note)


def _trees(model: Any, work: Workload) -> float:
    from evaluation.prefix_tree import TREE_TOKENS, build_tree, packs_of

    sizes = [len(build_tree(texts).tokens) for texts in work.questions]
    packs = packs_of(sizes, TREE_TOKENS)
    counted = packs[::SAMPLE]
    seen = sum(sizes[i] for pack in counted for i in pack)
    total = sum(
        flops.scoring(model, [work.questions[i] for i in pack], 1 << 30).flops for pack in counted
    )
    return total / seen * sum(sizes)


def decode_slots(work: Workload, per_token: float) -> tuple[float, float]:
    """FLOPs of generation: in the data's order by 30, and sorted by prompt by 64.

    A batch runs until its longest answer ends; prompts are padded to the longest of their batch.
    """
    sizes = [(text[0].n_prompt, text[0].n_targets) for text in work.questions]

    def slots(order: Sequence[tuple[int, int]], size: int) -> int:
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return sum(
            len(b) * (max(p for p, _ in b) + max(answer for _, answer in b)) for b in batches
        )

    plain = slots(sizes, PLAIN_DECODE)
    ours = slots(sorted(sizes, reverse=True), OUR_DECODE)
    return plain * per_token, ours * per_token


def measure(
    work: Workload,
    shape: str,
    *,
    device: str = "cpu",
    load_in_4bit: bool = False,
    rank: int = 16,
    seconds: float = 6.0,
    on_progress: Callable[[str], None] | None = None,
) -> list[Line]:
    """Rows a second and peak memory of both ways on the same model and rows, in turns.

    Args:
        work: see `load_workload`.
        shape: one of `flops.SHAPES`; random weights.
        device: "cpu" or "cuda".
        load_in_4bit: nf4 projections.
        rank: of the LoRA.
        seconds: how long each way runs at least; the best of its rounds counts.
        on_progress: called with what is measured next.
    """
    import torch

    from unlearner.environment import threads_for

    say = on_progress or (lambda text: None)
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    base = flops.new_llama(shape, device, "bfloat16" if cuda else "float32")
    if load_in_4bit:
        quantise(base)
    model = flops.with_lora(base, rank)
    forget, retain = work.forget[:PAIRS], work.retain[:PAIRS]
    asked = work.questions[:: max(1, len(work.questions) // 24)][:24]
    if not cuda:
        asked = asked[:8]
    ways: list[tuple[str, float, Callable[[], None], Callable[[], None], float | None]] = [
        (
            "training rows/s", 2 * PAIRS, lambda: _plain_step(model, forget, retain),
            lambda: _our_step(model, forget, retain), 4.0,
        ),
        (
            "scoring rows/s", sum(map(len, asked)), lambda: _plain_scores(model, asked),
            lambda: _our_scores(model, asked), 4.0,
        ),
        (
            "generation rows/s", len(asked), lambda: _plain_answers(model, asked),
            lambda: _our_answers(model, asked), None,
        ),
    ]  # fmt: skip
    lines = []
    with threads_for(model):
        for name, rows, plain, ours, target in ways:
            say(name)
            rates, peaks = _in_turns(plain, ours, rows, seconds, model)
            goal = f"at least {target:g} x" if target and not cuda else ""
            ratio = rates[1] / rates[0]
            met = ratio >= (target or 0) if goal else None
            lines.append(Line(name, "rows/s", rates[0], rates[1], ratio, goal, met))
            what = f"peak memory, {name.split()[0]}"
            lines.append(Line(what, "MB", peaks[0] / 1e6, peaks[1] / 1e6, peaks[0] / peaks[1]))
    return lines


def _in_turns(
    plain: Callable[[], None], ours: Callable[[], None], rows: float, seconds: float, model: Any
) -> tuple[list[float], list[int]]:
    """Best rows a second and peak bytes of both, run in turns so that noise meets both."""
    import torch

    from unlearner import preflight

    device = next(model.parameters()).device
    best, peaks, spent = [0.0, 0.0], [0, 0], [0.0, 0.0]
    rounds = 0
    while rounds < 2 or min(spent) < seconds:
        for i, way in enumerate((plain, ours)):
            preflight.start_counting(device)
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = time.perf_counter() - start
            spent[i] += took
            peaks[i] = max(peaks[i], preflight.peak(device))
            best[i] = max(best[i], rows / took) if rounds else 0.0  # the first round warms up
        rounds += 1
        if rounds >= 2 and max(spent) > 6 * seconds:
            break
    return best, peaks


def _padded(rows: Sequence[Encoded], length: int) -> dict[str, torch.Tensor]:
    filler = Encoded([0] * length, [-100] * length)
    return {k: v[:-1, :length] for k, v in pad_batch([*rows, filler], 0).items()}


def _plain_nll(model: Any, rows: Sequence[Encoded], length: int) -> torch.Tensor:
    """Mean NLL a row from the logits of all positions."""
    import torch.nn.functional as F

    batch = {k: v.to(next(model.parameters()).device) for k, v in _padded(rows, length).items()}
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    )
    logits, labels = out.logits[:, :-1].float(), batch["labels"][:, 1:]
    nll = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return nll.sum(-1) / (labels != -100).sum(-1)


def _plain_step(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> None:
    from unlearner.losses import simnpo

    _train_mode(model)
    for i in range(0, len(forget), 2):  # forwards of a few rows, as the released recipe has them
        f = _plain_nll(model, forget[i : i + 2], flops.PLAIN_TRAIN)
        r = _plain_nll(model, retain[i : i + 2], flops.PLAIN_TRAIN)
        (simnpo(f, f.new_ones(len(f)), 2.5, 0.0).sum() + 0.1375 * r.sum()).backward()
    model.zero_grad(set_to_none=True)


def _our_step(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> None:
    from unlearner.likelihood import answer_nll
    from unlearner.losses import simnpo
    from unlearner.packing import pack_attention, pack_rows

    _train_mode(model)
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in pack_rows([*forget, *retain]).items()}
    with pack_attention(model):
        found = answer_nll(model, batch)
        f, n = found.nll[: len(forget)], found.n[: len(forget)]
        kept = found.per_token[len(forget) :]
        (simnpo(f, n, 2.5, 0.0).sum() + 0.1375 * kept.sum()).backward()
    model.zero_grad(set_to_none=True)


def _train_mode(model: Any) -> None:
    model.train()


def _plain_scores(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    import torch

    model.eval()
    with torch.no_grad():
        for texts in questions:
            _plain_nll(model, texts, flops.PLAIN_EVAL)


def _our_scores(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    import torch

    from evaluation.prefix_tree import score_trees

    model.eval()
    with torch.no_grad():
        score_trees(model, questions)


def _prompts(questions: Sequence[Sequence[Encoded]]) -> list[tuple[list[int], int]]:
    first = [texts[0] for texts in questions]
    return [(text.input_ids[: text.n_prompt], text.n_targets) for text in first]


def _answer(model: Any, asked: Sequence[tuple[list[int], int]]) -> None:
    import torch

    device = next(model.parameters()).device
    batch = pad_batch([Encoded(ids, ids) for ids, _ in asked], 0, left=True)
    longest = max(budget for _, budget in asked)
    with torch.no_grad():
        model.get_base_model().generate(
            batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=longest,
            min_new_tokens=longest,  # random weights know no end
            do_sample=False,
            pad_token_id=0,
        )


def _plain_answers(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    model.eval()
    asked = _prompts(questions)
    for i in range(0, len(asked), PLAIN_DECODE):
        _answer(model, asked[i : i + PLAIN_DECODE])


def _our_answers(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    model.eval()
    asked = sorted(_prompts(questions), key=lambda item: -len(item[0]))
    for i in range(0, len(asked), OUR_DECODE):
        _answer(model, asked[i : i + OUR_DECODE])


def quantise(model: Any) -> None:
    """Puts the projections of a Llama with random weights into nf4, in place."""
    import bitsandbytes as bnb
    import torch

    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if not isinstance(linear, torch.nn.Linear):
                    continue
                four = bnb.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    compute_dtype=linear.weight.dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
                four.weight = bnb.nn.Params4bit(
                    linear.weight.data.cpu(),
                    requires_grad=False,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                setattr(block, name, four.to(linear.weight.device))
                if hasattr(four, "support_avx512bf16_for_cpu"):
                    four.support_avx512bf16_for_cpu = False  # see adapters.base_model
