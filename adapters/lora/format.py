"""The two files of a LoRA adapter: what is accepted, and the one way its configuration is written.

Accepted is plain LoRA on linear layers of every block: one rank, one alpha, no bias, no further
modules, safetensors. Such adapters add up, can be switched off exactly, fold into weights
and load in PEFT, vLLM and llama.cpp alike; everything else is refused with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.atomic_files import dump_json, read_json
from adapters.base.weights import stored_matrices
from adapters.errors import BaseMismatch, StoreCorrupt, UserError
from adapters.tensors import TensorFile, read_header

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TARGET = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
# Layers that an adapter must not touch: embeddings, heads, and the routers of experts.
FORBIDDEN = frozenset({
    "embed_in", "embed_out", "embed_tokens", "gate", "lm_head", "router", "shared_expert_gate",
    "wg", "wpe", "wte",
})  # fmt: skip
MAX_RANK = 1024
# A random start is gone once trained; PiSSA, OLoRA, CorDA, LoftQ and the like change the base.
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
# Settings that say nothing while the feature they belong to is off.
INERT = {
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": HARMLESS_INITS,
    "bias": ("none", None),
    "task_type": ("CAUSAL_LM", None),
    "peft_type": ("LORA",),
}
OWN = ("r", "lora_alpha", "lora_dropout", "target_modules")
FREE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "runtime_config")
REASONS = {
    "use_dora": "DoRA depends on the base weights and does not add up in a stack",
    "use_rslora": "rsLoRA's scaling is ignored by vLLM and llama.cpp",
    "modules_to_save": "whole modules replaced cannot be stacked or switched off exactly",
    "lora_bias": "the layers have no bias to add to",
    "bias": "the layers have no bias to add to",
    "rank_pattern": "several ranks in one adapter are not read by vLLM",
    "alpha_pattern": "several alphas in one adapter are ignored by vLLM",
    "init_lora_weights": "this initialisation changes the base weights",
    "loftq_config": "LoftQ changes the base weights",
    "layers_to_transform": "an adapter has to cover every layer",
    "trainable_token_indices": "changed embeddings cannot be stacked",
    "auto_mapping": "it names a class to import",
}
KEY = re.compile(
    r"base_model\.model\.(?:[A-Za-z_][A-Za-z0-9_]*\.)+(?P<layer>\d{1,4})\."
    r"(?P<place>(?:[A-Za-z0-9_]+\.)*(?P<module>[A-Za-z_][A-Za-z0-9_]*))"
    r"\.lora_(?P<side>[AB])\.weight"
)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk: canonical configuration, header of the weights, shape of every tensor."""

    config: dict[str, Any]
    weights: Path
    header: TensorFile
    tensors: dict[str, tuple[int, ...]]

    @property
    def unit(self) -> float:
        """Factor of B A at scale 1: alpha / r."""
        return float(self.config["lora_alpha"]) / float(self.config["r"])

    def modules(self) -> dict[str, tuple[str, str]]:
        """Module path in the base -> names of its A [r, in] and B [out, r]."""
        found: dict[str, tuple[str, str]] = {}
        for name in self.tensors:
            stem = name.rsplit(".lora_", 1)[0]
            path = stem.removeprefix("base_model.model.")
            found[path] = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
        return found


def read_adapter(folder: Path, *, any_float: bool = False) -> AdapterFiles:
    """The adapter in `folder`, its configuration and every tensor's name, dtype and shape checked.

    `any_float` also takes bf16 and f16 tensors (an import widens them exactly). Values are not
    read: see `check_finite`. Raises UserError for an adapter of another kind, StoreCorrupt for
    damaged files.
    """
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        raise _missing_weights(folder)
    raw = read_json(folder / CONFIG_NAME)
    check_config(raw, folder.name)
    header = read_header(weights)
    dtypes = {info.dtype for info in header.tensors.values()}
    allowed = {"F32", "BF16", "F16"} if any_float else {"F32"}
    if dtypes - allowed:
        raise UserError(
            f"The adapter in {folder.name} holds {', '.join(sorted(dtypes - allowed))} tensors.",
            "Save it in float32: anything less rounds what was trained.",
        )
    shapes = {name: info.shape for name, info in header.tensors.items()}
    _check_tensors(shapes, raw, folder.name)
    base = str(raw.get("base_model_name_or_path") or "")
    return AdapterFiles(canonical_config(raw, base), weights, header, shapes)


def check_config(raw: Mapping[str, Any], what: str) -> None:
    """Refuse every LoRA that is not plain; all reasons in one UserError."""
    problems = [f"{key}={_show(raw.get(key))} ({reason})" for key, reason in _odd_settings(raw)]
    problems += _shape_problems(raw)
    if problems:
        raise UserError(
            f"The configuration of {what} is refused: {'; '.join(problems)}.",
            "Only plain LoRA on linear layers of the blocks is kept here.",
        )


def canonical_config(raw: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The settings that mean something, in the one form that is hashed and stored."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": public_name(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": raw["lora_alpha"],
        "lora_dropout": float(raw.get("lora_dropout") or 0.0),
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": raw["r"],
        "rank_pattern": {},
        "revision": raw.get("revision"),
        "target_modules": sorted(raw["target_modules"]),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """The bytes of a canonical configuration as stored."""
    return (dump_json(dict(config), indent=2) + "\n").encode()


def public_name(base: str) -> str:
    """The base's name without the folders of this machine: of an absolute path the last part."""
    return Path(base).name if Path(base).is_absolute() or base.startswith("~") else base


def check_finite(files: AdapterFiles) -> None:
    """Read every value; StoreCorrupt where one is NaN or infinite."""
    import numpy as np

    for name in files.tensors:
        if not bool(np.isfinite(files.header.read(name)).all()):
            raise StoreCorrupt(
                f"{name} of {files.weights.parent.name} holds NaN or infinity.",
                "Train the adapter again, with a lower learning rate.",
            )


def require_fits(files: AdapterFiles, base_folder: Path) -> None:
    """Raise BaseMismatch unless every targeted matrix of the base has its A and B, and no more."""
    modules = files.modules()
    matrices = stored_matrices(base_folder, modules)
    targets = set(files.config["target_modules"])
    wanted = {path for path in matrices if path.rsplit(".", 1)[-1] in targets}
    if not any(".experts." in path for path in modules):
        # Experts are stored one by one, and fused into one parameter in the model: not targeted.
        wanted = {path for path in wanted if ".experts." not in path}
    missing, extra = sorted(wanted - set(modules)), sorted(set(modules) - wanted)
    if missing or extra:
        raise BaseMismatch(
            f"The adapter covers {len(modules)} matrices where the base has {len(wanted)}: "
            f"{(extra or missing)[0]} is {'not in the base' if extra else 'not covered'}.",
            "Import it with the base that it was trained on.",
        )
    for path, (name_a, name_b) in modules.items():
        rows, columns = matrices[path]
        if files.tensors[name_a][1] != columns or files.tensors[name_b][0] != rows:
            raise BaseMismatch(
                f"{path} of the base is {rows} x {columns}, the adapter's is "
                f"{files.tensors[name_b][0]} x {files.tensors[name_a][1]}.",
                "Import it with the base that it was trained on.",
            )


def update_norms(files: AdapterFiles) -> dict[str, float]:
    """Frobenius norm of the update scale * B A, per projection over all layers, and in `total`.

    From the thin factors: ||BA||^2 = trace(B^T B A A^T); no full matrix is made.
    """
    import numpy as np

    squares: dict[str, float] = {}
    for path, (name_a, name_b) in files.modules().items():
        a = files.header.read(name_a).astype(np.float64)
        b = files.header.read(name_b).astype(np.float64)
        square = float(np.sum((b.T @ b) * (a @ a.T))) * files.unit**2
        module = path.rsplit(".", 1)[-1]
        squares[module] = squares.get(module, 0.0) + max(square, 0.0)
    squares["total"] = sum(squares.values())
    return {name: float(f"{square**0.5:.9g}") for name, square in sorted(squares.items())}


def _missing_weights(folder: Path) -> UserError:
    if not folder.is_dir():
        return UserError(f"There is no folder {folder}.", "Check the path.")
    unsafe = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
    if unsafe:
        return UserError(
            f"{folder.name} holds {sorted(unsafe)[0]}, a pickle that can run code when loaded.",
            "Save the adapter as safetensors where it came from.",
        )
    return UserError(f"{folder.name} has no {WEIGHTS_NAME}.", "Give the folder of a LoRA adapter.")


def _odd_settings(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    odd = []
    for key, value in raw.items():
        if key in OWN or key in FREE:
            continue
        if key in INERT:
            fine = any(type(value) is type(a) and value == a for a in INERT[key])
        else:
            # A setting that is off or empty does nothing, whichever release of PEFT added it.
            fine = value is None or value is False or value in ({}, [])
        if not fine:
            odd.append((key, REASONS.get(key, "not part of a plain LoRA")))
    if "peft_type" not in raw:
        odd.append(("peft_type", "it is missing"))
    return odd


def _shape_problems(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    rank, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        problems.append(f"r={_show(rank)} (a whole number from 1 to {MAX_RANK} is needed)")
    if type(alpha) not in (int, float) or not 0 < alpha <= 1e6:  # type: ignore[operator]
        problems.append(f"lora_alpha={_show(alpha)} (a positive number is needed)")
    if dropout is not None and (type(dropout) not in (int, float) or not 0 <= dropout < 1):
        problems.append(f"lora_dropout={_show(dropout)} (0 to 1 is possible)")
    targets = raw.get("target_modules")
    if not isinstance(targets, (list, tuple)) or not targets:
        problems.append(f"target_modules={_show(targets)} (a list of layer names is needed)")
    elif odd := [t for t in targets if not isinstance(t, str) or not TARGET.fullmatch(t)]:
        problems.append(f"target_modules has {_show(odd[0])} (names of layers are needed)")
    elif forbidden := sorted(FORBIDDEN.intersection(targets)):
        problems.append(f"target_modules has {forbidden[0]} (no linear layer of the blocks)")
    elif len(set(targets)) != len(targets):
        problems.append("target_modules names a layer twice")
    for key in ("base_model_name_or_path", "revision"):
        value = raw.get(key)
        if value is not None and not (isinstance(value, str) and len(value) <= 300):
            problems.append(f"{key}={_show(value)} (a name is needed)")
    return problems


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]], raw: Mapping[str, Any], what: str
) -> None:
    """Every target in every block, A [r, in] and B [out, r], one shape per place in a block."""
    rank, targets = int(raw["r"]), set(raw["target_modules"])
    seen: dict[tuple[str, str], set[int]] = {}
    places: dict[str, set[tuple[str, int]]] = {"A": set(), "B": set()}
    width: dict[tuple[str, str], int] = {}
    for name, shape in shapes.items():
        match = KEY.fullmatch(name)
        if match is None or match["module"] not in targets:
            raise UserError(
                f"{what} holds the tensor {name[:120]!r}, which is not part of its LoRA.",
                "Keep only lora_A and lora_B of the target modules.",
            )
        key = (match["place"], match["side"])
        inner, outer = (0, 1) if match["side"] == "A" else (1, 0)
        if len(shape) != 2 or shape[inner] != rank or shape[outer] < 1:
            raise UserError(
                f"{name} of {what} has shape {list(shape)}, which does not fit rank {rank}.",
                "The configuration and the weights do not belong together.",
            )
        if width.setdefault(key, shape[outer]) != shape[outer]:
            raise UserError(
                f"{name} of {what} has another width than the same layer of other blocks.",
                "Only adapters of one shape in all blocks are kept here.",
            )
        block = int(match["layer"])
        seen.setdefault((match["module"], match["side"]), set()).add(block)
        places[match["side"]].add((match["place"], block))
    layers = set().union(*seen.values()) if seen else set()
    complete = set(range(len(layers)))
    for module in sorted(targets):
        for side in "AB":
            if not layers or seen.get((module, side)) != complete:
                raise UserError(
                    f"{what} lacks lora_{side} of {module} in some block.",
                    "An adapter has to cover every block; save it again.",
                )
    if unpaired := sorted(places["A"] ^ places["B"]):
        place, block = unpaired[0]
        raise UserError(
            f"{what} has only one of lora_A and lora_B of {place} in block {block}.",
            "Save it again.",
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
