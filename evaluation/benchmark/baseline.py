"""A standard implementation and this one on the same model and rows: speed and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from adapters.environment import evaluating
from evaluation.benchmark import flops
from evaluation.benchmark.run import PAIRS, PLAIN_DECODE, Line, Workload
from evaluation.benchmark.shapes import new_llama, with_lora
from evaluation.benchmark.whole_evaluation import measure_evaluation, plain_nll
from evaluation.inference.generation import BATCH_SIZE
from evaluation.inference.prefix_sharing import score_trees
from evaluation.suite import EvalData
from unlearner.defaults import LARGEST_FORWARD, LARGEST_ON_CPU
from unlearner.tokens.decoding import Prompt, greedy
from unlearner.tokens.prompts import Encoded, pad_batch

if TYPE_CHECKING:
    from adapters.base.load import BaseSpec

# Rows of each set that are evaluated on a real model.
EVALUATED = 40


def measure(
    work: Workload,
    shape: str,
    *,
    base: BaseSpec | None = None,
    device: str = "cpu",
    load_in_4bit: bool = False,
    rank: int = 16,
    seconds: float = 6.0,
    on_progress: Callable[[str], None] | None = None,
) -> list[Line]:
    """Rows per second and peak memory of both implementations, in turns.

    Args:
        work: see `load_workload`.
        shape: one of `shapes.SHAPES`; random weights.
        base: a real model in place of these, loaded as it says. The standard implementation then
            pads to the longest row of a batch, as Trainer does, not to 500 and 200 tokens, and a
            whole evaluation is timed in place of single batches.
        device: "cpu" or "cuda".
        load_in_4bit: nf4 projections.
        rank: of the LoRA.
        seconds: how long each runs at least; the best of its rounds counts.
        on_progress: called with the name of the next measurement.
    """
    import torch

    from adapters.base.load import auto_dtype, load_base
    from adapters.environment import threads_for

    say = on_progress or (lambda text: None)
    torch.manual_seed(0)
    cuda = device.startswith("cuda")
    if base is None:
        loaded: Any = new_llama(shape, device, auto_dtype(device), load_in_4bit=load_in_4bit)
    else:
        loaded = load_base(base)
        cuda = next(loaded.parameters()).is_cuda
    model = with_lora(loaded, rank)
    length, goal = (flops.PLAIN_TRAIN, 4.0) if base is None else (None, 2.0)
    forget, retain = work.forget[:PAIRS], work.retain[:PAIRS]
    ways: dict[str, tuple[tuple[int, float], Callable[[], Any], Callable[[], Any]]] = {
        "training rows/s": (
            (2 * PAIRS, goal), lambda: _plain_step(model, forget, retain, length),
            lambda: _our_step(model, forget, retain),
        ),
    }  # fmt: skip
    if base is None:
        questions = work.questions[:: max(1, len(work.questions) // 24)][: 24 if cuda else 8]
        ways |= {
            "scoring rows/s": (
                (sum(map(len, questions)), goal),
                lambda: _plain_scores(model, questions, flops.PLAIN_EVAL),
                lambda: score_trees(model, questions),
            ),
            "generation rows/s": (
                (len(questions), 0.0), lambda: _plain_answers(model, questions),
                lambda: _our_answers(model, questions),
            ),
        }  # fmt: skip
    lines = []
    for name, ((rows, target), plain, ours) in ways.items():
        say(name)
        within = nullcontext() if name.startswith("training") else evaluating(model)
        with threads_for(model), within:
            rates, peaks = _in_turns(plain, ours, rows, seconds, model)
        ratio = rates[1] / rates[0]
        aim = f"at least {target:g} x" if target and not cuda else ""
        met = ratio >= target if aim else None
        lines.append(Line(name, "rows/s", rates[0], rates[1], ratio, aim, met))
        what = f"peak memory, {name.split()[0]}"
        lines.append(Line(what, "MB", peaks[0] / 1e6, peaks[1] / 1e6, peaks[0] / peaks[1]))
    if base is not None:
        say("matrix products")
        step = flops.training_step(model, [*forget, *retain], packed=True).flops
        product = product_rate(loaded)
        used = step * (lines[0].ours or 0.0) / (2 * PAIRS) / 1e9
        aim, share = "at least 0.5 x", used / product
        name = "training beside bare products"
        lines.append(Line(name, "GFLOP/s", product, used, share, aim, share >= 0.5))
        if work.fmt is not None:
            sets = {name: rows[:EVALUATED] for name, rows in work.sets.items()}
            data = EvalData(sets.pop("forget05"), **sets)
            lines += measure_evaluation(model, work.fmt, data, say, None if cuda else (5.0, 3.0))
    return lines


def product_rate(model: Any, seconds: float = 1.0) -> float:
    """GFLOP per second of matrix products as the model's inner layers have them, on its device."""
    import torch

    weight = next(p for name, p in model.named_parameters() if "down_proj" in name)
    matrix = torch.randn(model.config.intermediate_size, model.config.hidden_size)
    matrix = matrix.to(weight.device, model.dtype)
    rows = torch.randn(1024, len(matrix)).to(matrix)
    done, started = -1, 0.0  # the first one warms up
    while done < 1 or time.perf_counter() - started < seconds:
        if done == 0:
            started = time.perf_counter()
        rows @ matrix
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        done += 1
    return 2 * done * len(rows) * matrix.numel() / (time.perf_counter() - started) / 1e9


def _in_turns(
    plain: Callable[[], Any], ours: Callable[[], Any], rows: float, seconds: float, model: Any
) -> tuple[list[float], list[int]]:
    """Best rows per second and peak bytes of both, in turns so that noise affects both."""
    import torch

    from unlearner.memory import probe as preflight

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


def _plain_step(
    model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded], length: int | None
) -> None:
    from unlearner.objectives.sequence import simnpo

    model.train()
    for i in range(0, len(forget), 2):  # forwards of a few rows, as in the released recipe
        f = plain_nll(model, forget[i : i + 2], length)
        r = plain_nll(model, retain[i : i + 2], length)
        (simnpo(f, f.new_ones(len(f)), 2.5, 0.0).sum() + 0.1375 * r.sum()).backward()
    model.zero_grad(set_to_none=True)


def _our_step(model: Any, forget: Sequence[Encoded], retain: Sequence[Encoded]) -> None:
    from unlearner.objectives.likelihood import answer_nll, on_device
    from unlearner.objectives.sequence import simnpo
    from unlearner.tokens.packing import pack_attention, pack_rows

    model.train()
    device = next(model.parameters()).device
    size = LARGEST_ON_CPU if device.type == "cpu" else LARGEST_FORWARD
    with pack_attention(model):
        for i in range(0, len(forget), size):
            rows = [*forget[i : i + size], *retain[i : i + size]]
            losses = answer_nll(model, on_device(pack_rows(rows), device))
            pushed = len(forget[i : i + size])
            f, n, r = losses.nll[:pushed], losses.n[:pushed], losses.per_token[pushed:]
            (simnpo(f, n, 2.5, 0.0).sum() + 0.1375 * r.sum()).backward()
    model.zero_grad(set_to_none=True)


def _plain_scores(model: Any, questions: Sequence[Sequence[Encoded]], length: int | None) -> None:
    for texts in questions:
        plain_nll(model, texts, length)


def _prompts(questions: Sequence[Sequence[Encoded]]) -> list[tuple[list[int], int]]:
    """The prompt of each question, and the length of its true answer in tokens."""
    first = [texts[0] for texts in questions]
    return [(text.input_ids[: text.n_prompt], text.n_targets) for text in first]


def _plain_answers(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    prompts = _prompts(questions)
    for start in range(0, len(prompts), PLAIN_DECODE):
        part = prompts[start : start + PLAIN_DECODE]
        batch = pad_batch([Encoded(ids, ids) for ids, _ in part], 0, left=True)
        longest = max(budget for _, budget in part)
        model.get_base_model().generate(
            batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=longest,
            min_new_tokens=longest,  # random weights know no end
            do_sample=False,
            pad_token_id=0,
        )


def _our_answers(model: Any, questions: Sequence[Sequence[Encoded]]) -> None:
    prompts = sorted(_prompts(questions), key=lambda prompt: -len(prompt[0]))
    for start in range(0, len(prompts), BATCH_SIZE):
        part = [Prompt(ids, budget) for ids, budget in prompts[start : start + BATCH_SIZE]]
        greedy(model.get_base_model(), part, (), 0)
