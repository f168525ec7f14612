"""One optimizer step at any shape beside the memory plan: for real, or on the meta device.

On the meta device tensors have sizes but no values, so that a step at 7B shape runs on any machine
in seconds. It is the code that trains: `loop.TrainingLoop` with `unlearning.UnlearnTask`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.benchmark.shapes import SHAPES, new_llama
from unlearner.config import TARGET_MODULES, LoraShape, UnlearnConfig, make_config
from unlearner.memory.plan import BasePrecision, MemoryPlan, llama_shape
from unlearner.tokens.batch_plan import Rows, plan_of
from unlearner.tokens.prompts import Encoded

if TYPE_CHECKING:
    from unlearner.objectives.guard import GuardRow


@dataclass(frozen=True)
class StepSetup:
    """What one step trains.

    Attributes:
        shape: one of `shapes.SHAPES`.
        layers: another number of blocks than the shape has.
        device: "meta", "cpu" or "cuda".
        load_in_4bit: nf4 linear layers.
        dtype: of the weights and, on a GPU and on meta, of the products.
        config: objective, LoRA and training; "auto" checkpointing counts as "off".
        rows: encoded rows of the streams that the objective reads.
        guard: teachers, one for each guard row.
    """

    shape: str
    rows: Rows
    config: UnlearnConfig
    layers: int | None = None
    device: str = "meta"
    load_in_4bit: bool = True
    dtype: str = "bfloat16"
    guard: Sequence[GuardRow] = ()

    def plan(self) -> MemoryPlan:
        """The memory plan of this step; on meta that of a GPU, without its context."""
        width, inner, depth, _, vocabulary = SHAPES[self.shape]
        shape = llama_shape(width, inner, self.layers or depth, vocabulary, width, tied=False)
        rows = [*self.rows.forget, *self.rows.retain]
        lengths = [len(row.input_ids) for row in rows]
        on_gpu = self.device != "cpu"
        precision = BasePrecision(self.load_in_4bit, 4 if self.dtype == "float32" else 2, on_gpu)
        return MemoryPlan(shape, self.config, precision, lengths, len(self.rows.forget))


@dataclass(frozen=True)
class StepCost:
    """What a step took.

    Attributes:
        peak: bytes; tracked tensors on meta, reserved on a GPU, the growth of the resident memory
            of this process on a CPU.
        low: what the plan estimates at least, without the CUDA context where the peak has none.
        high: the same at most.
        seconds: of the step.
        build_seconds: of making the model.
        loss: of the step, None on meta.
        parts: bytes of the peak by kind, on meta alone.
    """

    peak: int
    low: float
    high: float
    seconds: float
    build_seconds: float
    loss: float | None = None
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def within(self) -> bool:
        """Whether the peak is no more than the plan said."""
        return self.peak <= self.high

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return {**asdict(self), "within_plan": self.within}


def setup_of(
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    shape: str,
    *,
    pairs: int = 8,
    rank: int = 16,
    checkpointing: str = "all",
    objective: str = "simnpo",
    padded: bool = False,
    **options: Any,
) -> StepSetup:
    """A step of `pairs` pairs of the given rows; `options` are those of `StepSetup`."""
    config = make_config(
        objective,
        lora_r=rank,
        lora_alpha=2 * rank,
        per_device_train_batch_size=pairs,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        warmup_ratio=0.0,
        gradient_checkpointing=checkpointing,
        padded=padded,
    )
    lora = LoraShape(rank, 2 * rank, target_modules=TARGET_MODULES)
    rows = Rows(list(forget[:pairs]), list(retain[:pairs]))
    return StepSetup(shape, rows, replace(config, lora=lora), **options)


def run_step(setup: StepSetup, say: Callable[[str], None] = lambda text: None) -> StepCost:
    """Build the model, take the step and measure it.

    Raises:
        RuntimeError: on meta, an operation that mixes devices.
    """
    import torch

    from adapters.environment import return_freed_memory, threads_for
    from adapters.lora.stack import add_trainable
    from unlearner.memory import probe
    from unlearner.run import lora_config
    from unlearner.tokens.packing import pack_attention
    from unlearner.training.loop import TrainingLoop
    from unlearner.training.unlearning import UnlearnData, UnlearnTask

    if setup.device == "cpu":
        return_freed_memory()  # what is resident is then what tensors take
    resident = probe.resident_memory()
    torch.manual_seed(0)
    start = time.perf_counter()
    say("Building the model ...")
    base = new_llama(
        setup.shape,
        setup.device,
        setup.dtype,
        layers=setup.layers,
        load_in_4bit=setup.load_in_4bit,
    )
    with torch.device(setup.device):
        model = add_trainable(base, "new", lora_config(setup.config.lora), [])
    built = time.perf_counter() - start
    rows, train = setup.rows, setup.config.train
    packed = not train.padded
    events: list[dict[str, Any]] = []
    meta = setup.device == "meta"
    say("Taking the step ...")
    with ExitStack() as stack:
        stack.enter_context(threads_for(model))
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unlearner-")))
        if packed:
            stack.enter_context(pack_attention(model))
        data = UnlearnData(rows, plan_of(rows, train), 0, packed, setup.guard)
        task = UnlearnTask(model, data, setup.config)
        stack.callback(task.remove)
        loop = TrainingLoop(model, task, train, work, report=events.append)
        start = time.perf_counter()
        if meta:
            parts = _tracked(loop, model, setup.dtype)
            peak, loss = sum(parts.values()), None
        else:
            from unlearner.interrupt import StopRequest

            parts = {}
            probe.start_counting(loop.device)
            loop.run(StopRequest())
            on_gpu = loop.device.type == "cuda"
            peak = probe.peak(loop.device) - (0 if on_gpu else resident)
            loss = events[-1]["forget_loss"]
        seconds = time.perf_counter() - start
    terms = setup.plan().estimate().terms
    if meta:
        terms.pop("context", None)
    low, high = (sum(term[end] for term in terms.values()) for end in (0, 1))
    return StepCost(peak, low, high, seconds, built, loss, parts)


def score_on_meta(
    setup: StepSetup, questions: Sequence[Sequence[Encoded]], tokens: int
) -> dict[str, int]:
    """Peak bytes by kind of teacher-forced scoring, as trees and as padded rows, on meta."""
    import torch

    from evaluation.inference.prefix_sharing import build_tree, forward_tree, packs_of
    from unlearner.objectives.likelihood import answer_nll, on_device
    from unlearner.tokens.prompts import pad_batch

    model = new_llama(
        setup.shape, dtype=setup.dtype, layers=setup.layers, load_in_4bit=setup.load_in_4bit
    )
    peaks: dict[str, int] = {}
    largest = packs_of(questions, tokens)[0]
    texts = [text for i in largest for text in questions[i]]

    def score_tree() -> None:
        forward_tree(model, build_tree(texts))

    def score_padded() -> None:
        answer_nll(model, on_device(pad_batch(texts, 0), torch.device("meta")))

    for name, score in (("trees", score_tree), ("padded", score_padded)):
        tracker = _tracker(model)
        with torch.no_grad(), one_device(), tracker:
            score()
        peaks[name] = sum(_by_kind(tracker).values())
    return peaks


def _tracked(loop: Any, model: Any, dtype: str) -> dict[str, int]:
    """Peak bytes by kind of two steps of the loop on meta."""
    tracker = _tracker(model)
    with half_products(dtype), one_device(), tracker:
        loop.probe()
    return _by_kind(tracker)


def _tracker(model: Any) -> Any:
    """Torch's MemTracker with the model's weights counted."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Tracker(MemTracker):
        """Without figures per module: they allow one call of each and no frozen weights."""

        def _pre_fw_hook(self, module: Any, inputs: Any) -> None: ...

        def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None: ...

        def _pre_bw_hook(self, module: Any, args: Any) -> None: ...

        def _post_bw_hook(self, module: Any, args: Any) -> None: ...

    tracker = Tracker()
    tracker.track_external(model, *_four_bit_tensors(model))
    return tracker


def _by_kind(tracker: Any) -> dict[str, int]:
    """Bytes of the peak on meta by MemTracker's kinds, without its total and what is zero."""
    for device, kinds in tracker.get_tracker_snapshot("peak").items():
        if device.type == "meta":
            return {
                str(getattr(kind, "value", kind)).lower(): size
                for kind, size in kinds.items()
                if size and kind != "Total"
            }
    return {}


def _four_bit_tensors(model: Any) -> list[Any]:
    """Scales of 4-bit weights, which are neither parameters nor buffers."""
    tensors = []
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            tensors += [state.absmax, state.code, *nested]
    return tensors


@contextmanager
def one_device() -> Iterator[None]:
    """Inside, an operation on tensors of the meta device and of the CPU is an error.

    Many kernels for the meta device take tensors of the CPU as well, where a GPU's would not. As on
    a GPU, tensors without dimensions may be anywhere, and copies go from one to the other. Whether
    a mask is all true is answered with no: transformers asks, and goes on with the mask.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    copies = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asks = func is torch.ops.aten._local_scalar_dense.default
            if asks and args[0].is_meta and args[0].dtype == torch.bool:
                return False
            if func not in copies:
                tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                devices = {t.device.type for t in tensors if t.dim()}
                if len(devices) > 1:
                    raise RuntimeError(f"{func} mixes tensors of {' and '.join(sorted(devices))}")
            return func(*args, **(kwargs or {}))

    with OneDevice():
        yield


@contextmanager
def half_products(dtype: str) -> Iterator[None]:
    """Inside, linear layers compute in `dtype`, as under autocast, which knows no meta device."""
    import torch
    import torch.nn.functional as F

    half, before = getattr(torch, dtype), torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(half)
        return F.linear(input.to(half), self.weight.to(half), bias)

    torch.nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Linear.forward = before  # type: ignore[method-assign]
