"""What a card must show: every path of training and evaluation that a CPU cannot prove.

Each check trains or scores a small model on the device and compares with a run in float32 on the
same device, or takes one step at 7B shape beside the memory plan. With `small` the same checks run
on a CPU, which proves the checks themselves.
"""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import Interrupted, UserError

if TYPE_CHECKING:
    from adapters.base.load import BaseSpec
    from unlearner.request.rows import Request, Row

# Half precision and nf4 against float32: losses relative, NLLs per row in nats.
LOSS_TOLERANCE, NLL_TOLERANCE = 0.05, 0.05
STEPS = 3
PAIRS = 4


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what was run.
        status: "ok", "failed" or "left out".
        seconds: it took.
        figures: what was measured, or why it failed or was left out.
    """

    name: str
    status: str
    seconds: float
    figures: str

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


class LeftOut(Exception):
    """The check cannot run on this machine."""


def run_checks(device: str, *, small: bool = False, minutes: float = 8.0) -> Iterator[Check]:
    """The checks, each as soon as it has run; one that fails does not stop the others.

    Args:
        device: "cuda" or "cpu".
        small: a smaller shape in place of that of 7B, for a machine without a card.
        minutes: no check begins later than this.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="unlearner-") as folder:
        bench = _Bench(Path(folder), device, small)
        for name, check in bench.checks():
            began = time.monotonic()
            if began - start > 60 * minutes:
                yield Check(name, "left out", 0.0, f"{minutes:g} minutes are over")
                continue
            try:
                status, figures = "ok", check()
            except LeftOut as reason:
                status, figures = "left out", str(reason)
            except Exception as error:  # the table says what failed, and the rest still runs
                first = (str(error).strip() or repr(error)).splitlines()[0]
                status, figures = "failed", f"{type(error).__name__}: {first}"
            yield Check(name, status, time.monotonic() - began, figures)


def markdown(checks: list[Check], device: str) -> str:
    """The checks as a Markdown table under a line that names the device."""
    lines = [f"{device}", "", "| check | result | seconds | figures |", "|---|---|---|---|"]
    for check in checks:
        figures = check.figures.replace("|", "\\|")
        lines.append(f"| {check.name} | {check.status} | {check.seconds:.1f} | {figures} |")
    return "\n".join(lines) + "\n"


def device_text(device: str) -> str:
    """Name, memory and software of the device."""
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if not device.startswith("cuda"):
        return f"CPU, {versions}"
    card = torch.cuda.get_device_properties(torch.device(device))
    return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {versions}"


class _Bench:
    """A small base, its request, and the checks on it."""

    def __init__(self, folder: Path, device: str, small: bool) -> None:
        self.folder, self.device, self.small = folder, device, small
        self._runs = 0

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Name and function of every check."""
        short = {"bfloat16": "bf16", "float16": "fp16"}[self._half]
        for four in (False, True):
            for padded, checkpointing in product((False, True), ("off", "all")):
                name = (
                    f"simnpo, {'nf4' if four else short}, {'padded' if padded else 'packed'}, "
                    f"checkpointing {checkpointing}"
                )
                yield name, self._training("simnpo", four, padded, checkpointing)
        for objective in ("npo", "kl"):
            yield f"{objective}, {short}, packed", self._training(objective)
        yield f"simnpo on a stack with guard, {short}", self._guarded
        yield f"resume after step 2, {short}", self._resumed
        for attention in ("sdpa", "flash_attention_2"):
            yield f"evaluation, {short}, {attention}", lambda a=attention: self._evaluated(a)  # type: ignore[misc]
        shape = "tiny" if self.small else "llama2-7b"
        for pairs, checkpointing in ((8, "all"), (2, "off")):
            yield (
                f"one step at {shape} shape, nf4, {pairs} pairs, checkpointing {checkpointing}",
                lambda p=pairs, c=checkpointing: self._step(shape, p, c),  # type: ignore[misc]
            )

    # What is trained

    @cached_property
    def _half(self) -> str:
        """bf16, which a CPU can compute in too, or fp16 on a card that would emulate bf16."""
        from adapters.base.load import auto_dtype

        return auto_dtype(self.device) if self.device.startswith("cuda") else "bfloat16"

    @cached_property
    def _rows(self) -> list[Row]:
        from unlearner.world.build import build_world

        return [row for author in build_world(0).authors[:4] for row in author.rows]

    @cached_property
    def _base(self) -> Path:
        """A base with random weights, wide enough for every kernel."""
        from unlearner.baselines.tiny_llama import new_model, save_model, train_tokenizer
        from unlearner.baselines.tiny_recipe import TinyShape

        tokenizer = train_tokenizer([f"{r.question} {r.answer}" for r in self._rows], 700)
        shape = TinyShape(700, 64, 128, 2, 2) if self.small else TinyShape(700, 512, 1024, 4, 8)
        return save_model(new_model(tokenizer, shape, 0), tokenizer, self.folder / "base")

    def _spec(self, dtype: str, four: bool = False, attention: str = "auto") -> BaseSpec:
        from adapters.base.load import BaseSpec

        if four:
            _require_bitsandbytes()
        return BaseSpec(
            str(self._base),
            dtype=dtype,  # type: ignore[arg-type]
            load_in_4bit=four,
            device=self.device,
            attention=attention,  # type: ignore[arg-type]
        )

    def _request(self, part: int) -> Request:
        """The rows of one author; those of the others are retained."""
        from unlearner.request.rows import Request

        size = len(self._rows) // 4
        own = tuple(self._rows[part * size : (part + 1) * size][:PAIRS])
        others = tuple(self._rows[2 * size :][: 2 * PAIRS])
        return Request(f"author {part}", "rows", own, others)

    def _new_store(self) -> Any:
        from adapters.store.store import AdapterStore

        self._runs += 1
        return AdapterStore.open(self.folder / f"store-{self._runs}", create=True)

    def _train(
        self, objective: str, spec: BaseSpec, store: Any = None, part: int = 0, **settings: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        """The events of training and the adapter."""
        from unlearner.config import make_config
        from unlearner.run import RunOptions, unlearn

        options = settings.pop("options", RunOptions())
        after_step = settings.pop("after_step", None)
        config = make_config(
            objective,
            lora_r=4,
            lora_alpha=8,
            learning_rate=1e-3,
            num_train_epochs=STEPS,
            warmup_ratio=0.0,
            per_device_train_batch_size=PAIRS,
            gradient_accumulation_steps=1,
            **settings,
        )
        events: list[dict[str, Any]] = []
        adapter = unlearn(
            self._request(part),
            spec,
            config,
            store or self._new_store(),
            options,
            after_step=after_step,
            on_progress=events.append,
        )
        return [event for event in events if event["event"] == "train"], adapter

    @cached_property
    def _exact(self) -> dict[str, list[float]]:
        """Losses of every step in float32, by objective."""
        spec = self._spec("float32")
        return {
            objective: _losses(self._train(objective, spec)[0])
            for objective in ("simnpo", "npo", "kl")
        }

    # The checks

    def _training(
        self,
        objective: str,
        four: bool = False,
        padded: bool = False,
        checkpointing: str = "off",
    ) -> Callable[[], str]:
        def check() -> str:
            spec = self._spec(self._half, four)
            steps, adapter = self._train(
                objective, spec, padded=padded, gradient_checkpointing=checkpointing
            )
            losses, exact = _losses(steps), self._exact[objective]
            gap = max(abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True))
            # 4 bit is another function: its loss is only near.
            _require(gap < (4 if four else 1) * LOSS_TOLERANCE, f"losses are {gap:.1%} off float32")
            packed = adapter.manifest.train["packed"]
            _require(packed is not padded, "rows were padded, not packed")
            peak = adapter.manifest.train["probe_bytes"] / 2**20
            return f"losses within {gap:.2%} of float32, probe {peak:.0f} MiB"

        return check

    def _guarded(self) -> str:
        from unlearner.run import RunOptions

        store, spec = self._new_store(), self._spec(self._half)
        _, first = self._train("simnpo", spec, store)
        store.activate([first.slug])
        options = RunOptions(on_stack=True, guard=self._request(0).rows)
        steps, second = self._train("simnpo", spec, store, part=1, options=options)
        _require(second.manifest.train["guard_rows"] == PAIRS, "the guard has no rows")
        guard = steps[-1]["guard_loss"]
        _require(math.isfinite(guard), "the guard's loss is not finite")
        return f"guard loss {guard:.2g} after {len(steps)} steps"

    def _resumed(self) -> str:
        import signal

        from safetensors.torch import load_file

        from adapters.lora.format import WEIGHTS_NAME
        from unlearner.run import RunOptions

        spec, store = self._spec(self._half), self._new_store()
        _, whole = self._train("simnpo", spec)

        def stop(step: int, steps: int, model: Any) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGINT)

        try:
            self._train("simnpo", spec, store, after_step=stop)
            raise RuntimeError("the run did not stop")
        except Interrupted:
            _, resumed = self._train("simnpo", spec, store, options=RunOptions(resume=True))
        one, other = (load_file(a.path / WEIGHTS_NAME) for a in (whole, resumed))
        gap = max(float((one[name] - other[name]).abs().max()) for name in one)
        _require(gap < 1e-4, f"weights differ by {gap:.2g} from a run that was not stopped")
        return f"weights within {gap:.1g} of a run that was not stopped"

    def _evaluated(self, attention: str) -> str:
        import torch

        from adapters.base.load import load_base, load_tokenizer
        from evaluation.inference.scoring import score_rows
        from unlearner.tokens.prompts import prompt_format

        if attention == "flash_attention_2" and (
            importlib.util.find_spec("flash_attn") is None or not self.device.startswith("cuda")
        ):
            raise LeftOut("the package flash-attn is not installed, or there is no GPU")
        fmt = prompt_format(load_tokenizer(str(self._base)))
        rows = self._rows[:16]

        def scores(spec: BaseSpec, shared: bool) -> list[float]:
            records = score_rows(load_base(spec), fmt, rows, shared=shared)
            return [record.answer_score.mean_nll for record in records if record.answer_score]

        with torch.no_grad():
            exact = scores(self._spec("float32", attention="eager"), False)
            found = scores(self._spec(self._half, attention=attention), True)
        gap = max(abs(a - b) for a, b in zip(exact, found, strict=True))
        _require(gap < NLL_TOLERANCE, f"NLLs are {gap:.2g} nats per token off float32")
        return f"NLLs within {gap:.1g} nats per token of float32"

    def _step(self, shape: str, pairs: int, checkpointing: str) -> str:
        from adapters.base.load import auto_dtype
        from adapters.environment import free_memory
        from evaluation.benchmark.run import load_workload
        from evaluation.benchmark.step import run_step, setup_of
        from unlearner.memory.probe import size_text

        _require_bitsandbytes()
        work = load_workload(None, None)
        free_memory()
        setup = setup_of(
            work.forget,
            work.retain,
            shape,
            pairs=pairs,
            checkpointing=checkpointing,
            device=self.device,
            dtype=auto_dtype(self.device),
        )
        cost = run_step(setup)
        plan = f"{size_text(cost.low)} to {size_text(cost.high)}"
        text = f"peak {size_text(cost.peak)}, plan {plan}, {cost.seconds:.1f} s"
        # The plan is of a card: a CPU's process also grows by what it loads.
        _require(cost.within or not self.device.startswith("cuda"), text)
        return text


def _losses(events: list[dict[str, Any]]) -> list[float]:
    losses = [event["forget_loss"] for event in events]
    _require(all(math.isfinite(loss) for loss in losses), "a loss is not finite")
    return losses


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed")


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise UserError(problem, "")
