"""How much memory a forget run will take, by formula, and what to change where it is too much.

Shapes come from the model's own configuration, built on the meta device, so that any architecture
is counted as it is. An estimate never refuses a run; only a measurement does
(`unlearner.memory.probe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import UserError
from unlearner.config import ALL_LINEAR, UnlearnConfig, streams_of
from unlearner.objectives.registry import protected_of

GIB = 1024**3
# nf4 with double quantisation, measured on 7B: 4.127 bits per weight.
NF4_BYTES = 4.127 / 8
# float32 weight and gradient of a trained parameter, and the moments of its optimizer.
TRAINED_BYTES, MOMENTS = 8, {"adamw": 8, "8bit": 2, "adafactor": 0.1, "sgd": 0}
# Saved for backward, bytes per token and layer, fitted to counts on 7B shapes (208 kB for float32
# adapters under autocast): 29.3 per hidden unit and 8 per intermediate unit.
ACTIVATION_HIDDEN, ACTIVATION_INTERMEDIATE = 29.3, 8.0
CHECKPOINT_HIDDEN = 2.0
# Rows of logits that exist at once: `objectives.likelihood.CHUNK`, which imports torch.
CHUNK = 512
# CUDA context and cuBLAS workspace, from published runs; never measured by us.
CONTEXT = (0.35 * GIB, 0.9 * GIB)
# What formulas miss: allocator rounding, layout, the kernels' own buffers.
SLACK = 0.15
# From most to least memory, and from fastest to slowest.
CHECKPOINTING = ("off", "4", "3", "2", "all")
# Tokens of the longest of TOFU's training rows under Llama-2's tokenizer.
LONGEST_TOFU_ROW = 164


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that its memory depends on.

    Attributes:
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        intermediate_size: width of the widest projection of a block.
        vocab_size: rows of the head.
        linear: (inputs, outputs, how many) of the linear layers of all blocks, by the last part of
            their name.
        other: weights outside these: embeddings, head, norms.
        plain_head: whether logits are the head's output and nothing else; otherwise those of all
            answer positions exist at once.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    linear: Mapping[str, tuple[int, int, int]]
    other: int
    plain_head: bool = True

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers, which nf4 quantises."""
        return sum(into * out * count for into, out, count in self.linear.values())

    def low_rank(self, rank: int, names: Sequence[str]) -> int:
        """Weights of a LoRA of this rank on the layers called `names`."""
        chosen = [self.linear[name] for name in names if name in self.linear]
        return rank * sum((into + out) * count for into, out, count in chosen)


def meta_model(folder: Path) -> Any:
    """The model in `folder` on the meta device, from its config.json; no weights are read.

    Raises:
        UserError: transformers cannot build a causal language model from it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()  # the empty weights are not yet shared
        model.name_or_path = str(folder)  # whose files say what the weights are called
        return model
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"{folder} has no config.json that transformers can use: {reason}",
            "Give a folder that holds a whole causal language model.",
        ) from error


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, from its config.json; see `meta_model`."""
    import torch

    model = meta_model(folder)
    text = model.config.get_text_config()
    blocks = model.get_decoder().layers
    linear: dict[str, tuple[int, int, int]] = {}
    for name, module in blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            last = name.rsplit(".", 1)[-1]
            into, out = module.in_features, module.out_features
            *sizes, count = linear.get(last, (into, out, 0))
            linear[last] = (sizes[0], sizes[1], count + 1)
    # A tied head has the embedding's weight, so that it is counted once.
    weights = sum(p.numel() for p in model.parameters())
    in_blocks = sum(into * out * count for into, out, count in linear.values())
    widest = max((max(into, out) for into, out, _ in linear.values()), default=0)
    return ModelShape(
        layers=len(blocks),
        hidden_size=int(text.hidden_size),
        intermediate_size=int(getattr(text, "intermediate_size", None) or widest),
        vocab_size=int(text.vocab_size),
        linear=linear,
        other=weights - in_blocks,
        plain_head=not getattr(text, "final_logit_softcapping", None),
    )


def llama_shape(
    hidden: int, intermediate: int, layers: int, vocabulary: int, key_value: int, *, tied: bool
) -> ModelShape:
    """The shape of a Llama, for models that are not at hand."""
    sizes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }
    linear = {name: (into, out, layers) for name, (into, out) in sizes.items()}
    embeddings = vocabulary * hidden * (1 if tied else 2)
    norms = hidden * (2 * layers + 1)
    return ModelShape(layers, hidden, intermediate, vocabulary, linear, embeddings + norms)


# From config.json of meta-llama/Llama-2-7b-hf, Llama-3.2-1B-Instruct and Llama-3.2-3B-Instruct.
LLAMA2_7B = llama_shape(4096, 11008, 32, 32000, 4096, tied=False)
LLAMA32_1B = llama_shape(2048, 8192, 16, 128256, 512, tied=True)
LLAMA32_3B = llama_shape(3072, 8192, 28, 128256, 1024, tied=True)


@dataclass(frozen=True)
class BasePrecision:
    """How the base is held in memory.

    Attributes:
        load_in_4bit: nf4 linear layers; embeddings and head are not quantised.
        weight_bytes: bytes per unquantised weight (2 for bf16, 4 for float32).
        on_gpu: adds context and workspace.
    """

    load_in_4bit: bool
    weight_bytes: int
    on_gpu: bool


@dataclass(frozen=True)
class MemoryEstimate:
    """Terms of the peak, each with its low and high end in bytes."""

    terms: dict[str, tuple[float, float]]

    @property
    def low(self) -> float:
        """Sum of the low ends."""
        return sum(low for low, _ in self.terms.values())

    @property
    def high(self) -> float:
        """Sum of the high ends."""
        return sum(high for _, high in self.terms.values())

    def to_json(self) -> dict[str, Any]:
        """Bytes by term and range, marked as an estimate."""
        return {
            "kind": "estimate",
            "terms_bytes": {
                name: [round(low), round(high)] for name, (low, high) in self.terms.items()
            },
            "low_bytes": round(self.low),
            "high_bytes": round(self.high),
        }


@dataclass(frozen=True)
class MemoryPlan:
    """All that the memory of a run depends on.

    Attributes:
        shape: of the base.
        config: LoRA shape, objective and training settings.
        precision: how the base is held.
        lengths: tokens of the rows.
        n_forget: forget rows; a step has no more pairs than these.
        guard_rows: teachers, each the size of its answer.
    """

    shape: ModelShape
    config: UnlearnConfig
    precision: BasePrecision
    lengths: Sequence[int]
    n_forget: int

    def with_train(self, **settings: Any) -> MemoryPlan:
        """The plan with other training settings."""
        return replace(
            self, config=replace(self.config, train=replace(self.config.train, **settings))
        )

    @property
    def adapter_parameters(self) -> int:
        """Trainable weights: `r * (inputs + outputs)` per adapted layer."""
        lora = self.config.lora
        names = (
            lora.target_modules if lora.target_modules != ALL_LINEAR else tuple(self.shape.linear)
        )
        return self.shape.low_rank(lora.lora_r, names)

    @property
    def attacker_parameters(self) -> int:
        """Weights of the simulated attacker, beside all linear layers; 0 without one."""
        rank = self.config.train.attack_rank if self.config.objective.attack_weight else 0
        return self.shape.low_rank(rank, tuple(self.shape.linear))

    @property
    def protected_bytes(self) -> float:
        """Bytes of the bases of protected directions, if no two layers shared one."""
        count = self.config.objective.protected_directions
        return 4.0 * sum(
            into * protected_of(into, count) * layers
            for into, _, layers in self.shape.linear.values()
        )

    def tokens_per_batch(self) -> tuple[int, int]:
        """Tokens of a packed micro-batch: of average rows, and of the longest there are."""
        train, objective = self.config.train, self.config.objective
        # At least two: guard rows may take the place of retain rows.
        streams = max(2, len(streams_of(objective))) + bool(objective.general_weight)
        rows = streams * min(train.per_device_train_batch_size, train.batch_size(self.n_forget))
        cut = sorted((min(n, train.max_length) for n in self.lengths), reverse=True) or [1]
        longest = sum(cut[:rows]) + max(0, rows - len(cut)) * cut[0]
        return round(rows * sum(cut) / len(cut)), longest

    def saved_bytes(self, tokens: float) -> float:
        """Bytes kept for the backward pass of `tokens` tokens.

        A checkpointed layer keeps its input alone; one layer at a time is whole while it is
        computed again.
        """
        shape, setting = self.shape, self.config.train.gradient_checkpointing
        scale = self.precision.weight_bytes / 2
        whole = scale * (
            ACTIVATION_HIDDEN * shape.hidden_size
            + ACTIVATION_INTERMEDIATE * shape.intermediate_size
        )
        if setting in ("off", "auto"):
            return tokens * shape.layers * whole
        every = 1 if setting == "all" else int(setting)
        checkpointed = -(-shape.layers // every)
        inputs = checkpointed * CHECKPOINT_HIDDEN * shape.hidden_size * scale
        return tokens * (inputs + (shape.layers - checkpointed) * whole + whole)

    def estimate(self) -> MemoryEstimate:
        """Peak memory of training."""
        shape, precision = self.shape, self.precision
        width = precision.weight_bytes
        per_weight = NF4_BYTES if precision.load_in_4bit else width
        weights = shape.linear_weights * per_weight + shape.other * width
        per_parameter = TRAINED_BYTES + _moment_bytes(self.config.train.optim)
        adapter = float(per_parameter * self.adapter_parameters)
        attacker = float((TRAINED_BYTES + MOMENTS["adamw"]) * self.attacker_parameters)
        usual, longest = self.tokens_per_batch()
        # Logits of a chunk of answer positions, their float32 copy, its softmax and gradient.
        chunk = shape.vocab_size * (width + 12.0)
        at_once = CHUNK if shape.plain_head else longest
        terms = {
            "weights": (weights, weights * 1.02),
            "adapter_and_optimizer": (adapter, adapter),
            "activations": (
                self.saved_bytes(usual),
                self.saved_bytes(longest) * (1 + SLACK),
            ),
            "logits": (min(at_once, 0.6 * usual) * chunk * 0.8, min(at_once, longest) * chunk),
        }
        if protected := self.protected_bytes:  # query, key and value share one
            terms["protected"] = (protected / 2, protected)
        if attacker:
            terms["attacker"] = (attacker, attacker)
        # A quantised layer is put back together for its product, and again for its gradient.
        largest = max((into * out for into, out, _ in shape.linear.values()), default=0)
        buffers = 2.0 * largest * width if precision.load_in_4bit else 0.0
        if precision.on_gpu or buffers:
            workspace = 2 * buffers + (0.1 * GIB if precision.on_gpu else 0.0)
            terms["workspace"] = (buffers, workspace)
        if precision.on_gpu:
            terms["context"] = CONTEXT
        return MemoryEstimate(terms)

    def choose_checkpointing(self, budget: float) -> str:
        """The fastest setting whose high estimate is within `budget` bytes, else "all"."""
        for setting in CHECKPOINTING:
            if self.with_train(gradient_checkpointing=setting).estimate().high <= budget:
                return setting
        return "all"

    def smallest_change(self, budget: float, factor: float = 1.0) -> Change | None:
        """The least that makes a run fit into `budget` bytes by the estimate, or None.

        Args:
            budget: bytes that may be used.
            factor: measured over estimated peak, where there is a measurement.
        """
        for flags, plan in self._changes():
            high = plan.estimate().high * factor
            if high <= budget:
                return Change(flags, plan, high)
        return None

    def _changes(self) -> Iterator[tuple[tuple[str, ...], MemoryPlan]]:
        """Ever smaller plans and the flags that lead there, each on top of the one before.

        First what costs only time (checkpointing, smaller micro-batches), then what changes the
        training (4 bit, a smaller attacker), then the adapter itself.
        """
        plan, flags = self, dict[str, str]()

        def step() -> tuple[tuple[str, ...], MemoryPlan]:
            return tuple(f"{name} {value}".strip() for name, value in flags.items()), plan

        current = plan.config.train.gradient_checkpointing
        for setting in _less_memory_than(current):
            flags["--gradient-checkpointing"] = setting
            plan = plan.with_train(gradient_checkpointing=setting)
            yield step()
        while (pairs := plan.config.train.per_device_train_batch_size) > 1:
            total = plan.config.train.gradient_accumulation_steps * pairs
            pairs //= 2
            parts = -(-total // pairs)
            flags["--per-device-train-batch-size"] = str(pairs)
            flags["--gradient-accumulation-steps"] = str(parts)
            plan = plan.with_train(
                per_device_train_batch_size=pairs, gradient_accumulation_steps=parts
            )
            yield step()
        if not plan.precision.load_in_4bit:
            flags["--load-in-4bit"] = ""
            plan = replace(plan, precision=replace(plan.precision, load_in_4bit=True))
            yield step()
        while plan.config.objective.attack_weight and plan.config.train.attack_rank > 4:
            plan = plan.with_train(attack_rank=plan.config.train.attack_rank // 2)
            flags["--attack-rank"] = str(plan.config.train.attack_rank)
            yield step()
        while (lora := plan.config.lora).lora_r > 4:
            config = replace(plan.config, lora=replace(lora, lora_r=lora.lora_r // 2))
            plan = replace(plan, config=config)
            flags["--lora-r"] = str(config.lora.lora_r)
            yield step()

    def advice(self, budget: float, factor: float = 1.0, *, resume: bool = False) -> str:
        """What to change so that it fits, as flags; or that nothing here would do.

        With `resume` it also says whether a stopped run continues with them, or is another run.
        """
        change = self.smallest_change(budget, factor)
        goes_on = " With --resume the run continues where it stopped." if resume else ""
        if change is None:
            return (
                "No setting here fits by the estimate: use a smaller base or a larger card."
                + goes_on
            )
        from unlearner.memory.probe import size_text

        flags = f"Add {' '.join(change.flags)} (estimated at {size_text(change.high)} or less)."
        same = change.plan.precision == self.precision and change.plan.config.recipe(
            self.n_forget
        ) == self.config.recipe(self.n_forget)
        if not resume:
            return flags
        restarts = " These flags change the result, so training restarts from step 0."
        return flags + (goes_on if same else restarts)


@dataclass(frozen=True)
class Change:
    """A plan that is estimated to fit, and the flags that lead there."""

    flags: tuple[str, ...]
    plan: MemoryPlan
    high: float


def _less_memory_than(setting: str) -> tuple[str, ...]:
    """The checkpointing settings that take less memory than `setting`."""
    if setting == "auto":
        return CHECKPOINTING
    if setting == "all":
        return ()
    if setting == "off":
        return CHECKPOINTING[1:]
    return tuple(
        other for other in CHECKPOINTING[1:] if other == "all" or int(other) < int(setting)
    )


def _moment_bytes(optimizer: str) -> float:
    """Bytes of optimizer state per trained parameter."""
    for part in ("8bit", "adafactor", "sgd"):
        if part in optimizer:
            return MOMENTS[part]
    return MOMENTS["adamw"]
