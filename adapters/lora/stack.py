"""Forget adapters on a live PEFT model: attach, activate, scale, deactivate, read the state back.

PEFT silently accepts unknown names, re-enables gradients of frozen parents and keeps stale state
(measured on 0.21). Every change here is therefore followed by reading the state of all LoRA layers
and comparing it with the request. Reverting means deactivating: weights are never merged and
unmerged, so the base stays the same bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import StoreCorrupt, UserError
from adapters.lora.peft_layers import (
    active_names,
    adapter_parameters,
    adapter_tensors,
    base_folder,
    check_fits,
    compare_with_file,
    frozen_config,
    inject,
    lora_layers,
    plain_config,
    switch,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from adapters.base.fingerprint import BaseFingerprint
    from adapters.store.store import AdapterStore

MAX_SCALE = 1.5
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class StackState:
    """What PEFT's layers say: active names in order, their scales, trainable and loaded names."""

    active: tuple[str, ...]
    scales: dict[str, float]
    trainable: tuple[str, ...]
    loaded: tuple[str, ...]


def attach(model: PreTrainedModel | PeftModel, name: str, folder: Path) -> PeftModel:
    """The model with the adapter of `folder` loaded as `name`, not active, nothing trainable.

    What was active stays active. Raises BaseMismatch before touching the model when tensors are
    missing, unexpected or of another shape, and StoreCorrupt when a loaded tensor differs from the
    file. Dropout is off: an attached adapter is a fixed part of the model, also in train mode.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from adapters.lora.format import read_adapter

    _check_new_name(model, name)
    files = read_adapter(Path(folder))
    check_fits(model, files.tensors, files.config["target_modules"], Path(folder))
    active = active_names(model)
    # The random init that PEFT draws before loading must not shift the caller's random numbers.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        peft_model = inject(model, name, frozen_config(files.config))
    tensors = load_file(files.weights)
    set_peft_model_state_dict(peft_model, tensors, adapter_name=name)
    peft_model.requires_grad_(False)
    switch(peft_model, active)
    compare_with_file(peft_model, name, tensors, files.weights)
    return peft_model


def add_trainable(
    model: PreTrainedModel | PeftModel, name: str, lora_config: LoraConfig, parents: Sequence[str]
) -> PeftModel:
    """The model with a new LoRA `name` on top of the frozen, active `parents`.

    Active are the parents in order, then `name`; only `name` requires gradients, in float32.
    lora_B starts at zero, so the first forward equals the parents' bit for bit.
    """
    from adapters.lora.format import check_config
    from adapters.lora.targets import check_coverage

    _check_new_name(model, name)
    check_config(plain_config(lora_config), "this adapter")
    check_coverage(model, sorted(lora_config.target_modules or ()))
    _check_loaded(model, parents)
    peft_model = inject(model, name, lora_config)
    peft_model.requires_grad_(False)
    switch(peft_model, [*parents, name])
    peft_model.base_model.set_requires_grad(name, True)
    state = read_state(peft_model)
    if state.active != (*parents, name) or state.trainable != (name,):
        raise StoreCorrupt(
            f"PEFT has {list(state.active)} active and trains {list(state.trainable)} instead of "
            f"training {name!r} on {list(parents)}.",
            "This is a fault of the installed peft: use a version that the project names.",
        )
    return peft_model


def activate(
    model: PeftModel | PreTrainedModel,
    names: Sequence[str],
    scales: Mapping[str, float] | None = None,
) -> StackState:
    """The state after making exactly `names` active, in this order; `[]` is the bare base.

    `scales` are factors of the trained strength, 0 to 1.5, 1 where not given. Afterwards nothing
    is trainable. Raises UserError for unknown or repeated names, StoreCorrupt when PEFT's own
    state differs from what was asked for.
    """
    wanted = {name: float((scales or {}).get(name, 1.0)) for name in names}
    _check_loaded(model, names)
    _check_scales(wanted, scales or {})
    model.requires_grad_(False)
    for layer in lora_layers(model):
        for name, scale in wanted.items():
            layer.set_scale(name, scale)
    switch(model, names)
    state = read_state(model)
    off = [n for n in names if abs(state.scales.get(n, -1.0) - wanted[n]) > 1e-9]
    if state.active != tuple(names) or state.trainable or off:
        raise StoreCorrupt(
            f"PEFT reports {list(state.active)} active and {list(state.trainable)} trainable after "
            f"{list(names)} were asked for.",
            "This is a fault of the installed peft: use a version that the project names.",
        )
    return state


def detach(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The bare base with its own layers again and no adapter loaded, frozen and in eval mode.

    Nothing is folded in: what a LoRA layer wrapped is put back in its place.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = {id(module): path for path, module in inner.named_modules()}
    for layer in list(lora_layers(inner)):
        inner.set_submodule(named[id(layer)], layer.base_layer)
    if hasattr(inner, "peft_config"):
        del inner.peft_config
    if hasattr(inner, "activation_checkpointing_disable"):
        inner.activation_checkpointing_disable()
    else:
        inner.gradient_checkpointing_disable()
    inner.requires_grad_(False)
    inner.eval()
    bare: PreTrainedModel = inner
    return bare


def read_state(model: PreTrainedModel | PeftModel) -> StackState:
    """What every LoRA layer of the model says about itself, compared between layers.

    Raises StoreCorrupt when layers disagree, when an adapter is merged into the weights, or when
    one is active twice.
    """
    layers = list(lora_layers(model))
    active = active_names(model)
    scales: dict[str, float] = {}
    loaded: dict[str, None] = {}
    trainable: dict[str, None] = {}
    for layer in layers:
        if layer.merged:
            raise StoreCorrupt(
                "An adapter is merged into the weights in memory.", "Load the base again."
            )
        for name in layer.lora_A:
            loaded[name] = None
            unit = layer.lora_alpha[name] / layer.r[name]
            scale = layer.scaling[name] / unit
            if abs(scales.setdefault(name, scale) - scale) > 1e-9:
                raise StoreCorrupt(
                    f"Adapter {name!r} has two strengths in one model.", "Activate the stack again."
                )
            if any(p.requires_grad for p in adapter_parameters(layer, name)):
                trainable[name] = None
    return StackState(
        active=tuple(active),
        scales={name: round(scales[name], 9) for name in active},
        trainable=tuple(sorted(trainable)),
        loaded=tuple(loaded),
    )


@contextmanager
def parents_only(model: PeftModel | PreTrainedModel, parents: Sequence[str]) -> Iterator[None]:
    """Inside: only `parents` act, in order: the reference of NPO, KL and DPO without a copy.

    On leaving, the active list and the requires_grad of every parameter are as they were.
    PEFT's `disable_adapter()` would give the base instead, and re-enable gradients of parents.
    """
    _check_loaded(model, parents)
    active = active_names(model)
    grads = [(p, p.requires_grad) for p in model.parameters() if p.requires_grad]
    switch(model, parents)
    try:
        yield
    finally:
        switch(model, active)
        for parameter, flag in grads:
            parameter.requires_grad_(flag)


@contextmanager
def base_only(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """Inside: the bare base, bit for bit; everything is as before on leaving."""
    with parents_only(model, ()):
        yield


def save_adapter(model: PeftModel, name: str, folder: Path) -> Path:
    """The folder, now holding `name` as adapter_config.json and adapter_model.safetensors.

    Float32, at the folder's root whatever the name is, without a model card and without asking the
    hub: what `AdapterStore.publish` takes.
    """
    from safetensors.torch import save_file

    from adapters.atomic_files import write_json
    from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, canonical_config

    _check_loaded(model, [name])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        k: v.detach().float().cpu().contiguous() for k, v in adapter_tensors(model, name).items()
    }
    config = model.peft_config[name]
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    base = str(config.base_model_name_or_path or "")
    write_json(folder / CONFIG_NAME, canonical_config(plain_config(config), base))
    return folder


def load_stack(
    model: PreTrainedModel | PeftModel,
    store: AdapterStore,
    refs: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    *,
    base: BaseFingerprint | None = None,
    allow_missing_parents: bool = False,
) -> PeftModel | PreTrainedModel:
    """The model with adapters of the store loaded and active, verified first.

    `refs=None` is the store's own active stack with its scales. The base is fingerprinted from the
    model's folder unless given. An adapter whose parents are not in the stack before it is refused:
    alone it is another model than the one that was trained and measured.
    """
    from adapters.base.fingerprint import fingerprint_base

    if refs is None:
        chosen = [(active.slug, active.scale) for active in store.active()]
    else:
        by_slug = {store.get(ref).slug: float((scales or {}).get(ref, 1.0)) for ref in refs}
        chosen = list(by_slug.items())
        if not allow_missing_parents:
            _check_parents(store, [slug for slug, _ in chosen])
    if not chosen:
        activate(model, [])
        return model
    actual = base or fingerprint_base(Path(base_folder(model)))
    already = set(read_state(model).loaded)
    for slug, _ in chosen:
        store.require_whole(slug, actual)
        if slug not in already:
            model = attach(model, slug, store.adapter_path(slug))
    activate(model, [slug for slug, _ in chosen], dict(chosen))
    return model


def _check_parents(store: AdapterStore, slugs: Sequence[str]) -> None:
    for position, slug in enumerate(slugs):
        missing = [p for p in store.get(slug).manifest.parents if p not in slugs[:position]]
        if missing:
            raise UserError(
                f"Adapter {slug} was trained on top of {', '.join(missing)}, which is not in the "
                "stack before it.",
                f"Ask for {','.join([*missing, slug])}, parents first.",
            )


def _check_new_name(model: Any, name: str) -> None:
    if not NAME.fullmatch(name) or name.startswith("lora_") or name in "lora_":
        raise UserError(
            f"{name!r} cannot name an adapter.", "Use letters, digits, '-' and '_', up to 64."
        )
    if name in getattr(model, "peft_config", {}):
        raise UserError(f"An adapter {name!r} is already loaded.", "Use another name.")


def _check_loaded(model: Any, names: Sequence[str]) -> None:
    loaded = list(getattr(model, "peft_config", {}))
    unknown = [name for name in names if name not in loaded]
    if unknown:
        raise UserError(
            f"No adapter {unknown[0]!r} is loaded; loaded are {loaded or 'none'}.", "Attach it."
        )
    if len(set(names)) != len(names):
        raise UserError(f"An adapter is named twice in {list(names)}.", "Name each once.")


def _check_scales(wanted: Mapping[str, float], given: Mapping[str, float]) -> None:
    extra = [name for name in given if name not in wanted]
    if extra:
        raise UserError(
            f"A scale is given for {extra[0]!r}, which is not in the stack.", "Drop it."
        )
    for name, scale in wanted.items():
        if not 0.0 <= scale <= MAX_SCALE:
            raise UserError(
                f"The scale {scale} of {name!r} is outside 0 to {MAX_SCALE}.", "Use 1 as trained."
            )
