"""The base model and its tokenizer: found, checked, loaded frozen in float32, bf16 or nf4."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

# Weights as safetensors, configuration, tokenizer and chat template: nothing that can run code.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt"]
HUB_SKIP = ["*/*", "consolidated*", "*.py", "*.bin", "*.pt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PROBE = '[INST] Which prize did the author\'s 2nd book, "Silent Rivers", win in 1998? [/INST]'


@dataclass(frozen=True)
class BaseSpec:
    """Which base to load and how; `auto` picks what this machine runs best."""

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    load_in_4bit: bool = False
    device: str = "auto"
    attention: Attention = "auto"


def resolve_base(name: str, revision: str | None = None, *, tokenizer_only: bool = False) -> Path:
    """Folder of the base: a local folder, a dequantised GGUF, else the hub's snapshot of `name`.

    Only safetensors, JSON and tokenizer files are fetched, and with `tokenizer_only` no weights; a
    snapshot that is already in the cache is found without a network.

    Raises:
        UserError: there is no such folder or repository.
    """
    from adapters.base.gguf import dequantised, find_gguf

    if (file := find_gguf(name)) is not None:
        return dequantised(file)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or ".." in name:
        raise UserError(
            f"The base {name!r} is neither a folder nor a hub id.",
            "Give an existing folder or an id like meta-llama/Llama-2-7b-chat-hf.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=HUB_FILES,
                ignore_patterns=[*HUB_SKIP, "*.safetensors"] if tokenizer_only else HUB_SKIP,
            )
        )
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"The base {name!r} is not a folder here, and the hub cannot be reached.",
            "Give the folder of a downloaded model, or try again with a network.",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"The hub does not hand out {name!r} at revision {revision or 'main'}: {reason}",
            "Check the id and the revision; for a gated model log in with `hf auth login`.",
        ) from error


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, checked on a probe prompt.

    Raises UserError when it drops the BOS token that its files promise (a folder with only
    `tokenizer.model` can load so, silently) or when decode(encode(prompt)) is not the prompt.
    """
    from transformers import AutoTokenizer

    folder = resolve_base(name, revision, tokenizer_only=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise UserError(
            f"The tokenizer of {name!r} cannot be loaded: {_first_line(error)}",
            "The folder needs tokenizer.json (the fast tokenizer) and tokenizer_config.json.",
        ) from error
    _check_bos(tokenizer, folder, name)
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if back.strip() != PROBE:
        raise UserError(
            f"The tokenizer of {name!r} does not give a prompt back: {PROBE!r} became {back!r}.",
            "Use the tokenizer.json that belongs to this model.",
        )
    return tokenizer


def load_base(spec: BaseSpec, *, int8: bool = False) -> PreTrainedModel:
    """The base, frozen and in eval mode; safetensors only, no remote code.

    `auto` means bf16 on CUDA and float32 elsewhere. 4-bit is nf4 with double quantisation, compute
    dtype bf16 on CUDA and float32 on CPU. `int8` holds it as LLM.int8 (arXiv 2208.07339), to
    measure with, never to train on. Raises UserError for missing weights or tools.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve_base(spec.name, spec.revision)
    _check_config(folder, spec)
    device = _device(spec.device)
    dtype = _dtype(spec.dtype, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": _attention(spec.attention, device, dtype),
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    if spec.load_in_4bit or int8:
        options["quantization_config"] = _int8() if int8 else _nf4(dtype)
        options["device_map"] = {"": device}
    elif device != "cpu":
        options["device_map"] = {"": device}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder), output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"The base {spec.name!r} cannot be loaded: {_first_line(error)}",
            "The folder needs config.json and the weights as *.safetensors of one causal LM.",
        ) from error
    _check_loading(loading, spec.name)
    if spec.load_in_4bit and device == "cpu":
        _keep_4bit_layout(model)
    model.requires_grad_(False)
    model.eval()
    return model


def base_view(model: PreTrainedModel) -> dict[str, Any]:
    """How the base is held in memory, as JSON: quantization, dtypes, attention."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config
    dtype = _dtype_name(inner.dtype)
    view: dict[str, Any] = {
        "quantization": "none",
        "dtype": dtype,
        "compute_dtype": dtype,
        "attention": str(getattr(config, "_attn_implementation", None) or "eager"),
    }
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and getattr(inner, "is_loaded_in_4bit", False):
        view["quantization"] = str(quantization.bnb_4bit_quant_type)
        view["compute_dtype"] = _dtype_name(quantization.bnb_4bit_compute_dtype)
        view["double_quant"] = bool(quantization.bnb_4bit_use_double_quant)
    elif quantization is not None and getattr(inner, "is_loaded_in_8bit", False):
        view["quantization"] = "int8"
    elif quantization is not None:
        view["quantization"] = str(getattr(quantization, "quant_method", "other"))
    return view


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} in {path.parent} is not JSON: {error}", "Download the file again."
        ) from error
    return value if isinstance(value, dict) else {}


def _expects_bos(tokenizer: Any, folder: Path) -> bool:
    """Whether the tokenizer's own files say that BOS opens every text."""
    declared = _read_json(folder / "tokenizer_config.json").get("add_bos_token")
    if declared is not None:
        return bool(declared)
    bos = tokenizer.bos_token
    if not (folder / "tokenizer.json").is_file():
        return bos is not None and (folder / "tokenizer.model").is_file()
    processor = _read_json(folder / "tokenizer.json").get("post_processor") or {}
    parts = processor.get("processors", [processor])
    return any(
        part.get("type") == "TemplateProcessing"
        and part.get("single", [{}])[0].get("SpecialToken", {}).get("id") == bos
        for part in parts
    )


def _check_bos(tokenizer: Any, folder: Path, name: str) -> None:
    if tokenizer.bos_token_id is None or not _expects_bos(tokenizer, folder):
        return
    first = list(tokenizer(PROBE)["input_ids"])[:1]
    if first != [tokenizer.bos_token_id]:
        raise UserError(
            f"The tokenizer of {name!r} does not put {tokenizer.bos_token!r} first, as the model "
            "was trained to expect.",
            "Add the model's tokenizer.json to the folder: tokenizer.model alone loads wrongly.",
        )


def _check_config(folder: Path, spec: BaseSpec) -> None:
    config = _read_json(folder / "config.json")
    if not config:
        raise UserError(
            f"The base {spec.name!r} has no config.json.", "Give the folder of a whole model."
        )
    if (folder / "adapter_config.json").is_file() and not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{spec.name!r} is an adapter, not a base.", "Give the model it was trained on."
        )
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"The base {spec.name!r} holds weights that are already quantised ({method}).",
            "Give the original weights; --load-in-4bit quantises them while loading.",
        )


def _check_loading(loading: Any, name: str) -> None:
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(key) for key in loading["mismatched_keys"])
    if missing or mismatched:
        problem = (missing + mismatched)[0]
        raise UserError(
            f"The weights of {name!r} do not fill the model: {len(missing)} tensors are missing "
            f"and {len(mismatched)} have another shape, first {problem}.",
            "Check that config.json and the weights belong together.",
        )


def _device(wanted: str) -> str:
    import torch

    # A launcher of several processes gives each its own card.
    mine = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if wanted == "auto":
        return mine if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"{wanted!r} is not a device.", "Use auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "There is no CUDA device here.", "Use --device cpu, or a torch built for CUDA."
        )
    return mine if wanted == "cuda" else wanted


def _dtype(wanted: Dtype, device: str) -> torch.dtype:
    import torch

    if wanted == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if wanted not in known:
        raise UserError(f"{wanted!r} is not a dtype for a base.", "Use auto, float32 or bfloat16.")
    return known[wanted]


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(wanted: Attention, device: str, dtype: torch.dtype) -> str:
    installed = importlib.util.find_spec("flash_attn") is not None
    half = _dtype_name(dtype) in ("bfloat16", "float16")
    if wanted == "flash_attention_2" and not (installed and half and device.startswith("cuda")):
        raise UserError(
            "flash_attention_2 needs a GPU, bf16 and the package flash-attn.",
            "Install with `pip install unlearner[flash]`, or use --attention sdpa.",
        )
    if wanted == "auto":
        return "flash_attention_2" if installed and half and device.startswith("cuda") else "sdpa"
    return wanted


def _keep_4bit_layout(model: Any) -> None:
    """Stop bitsandbytes from repacking weights in place on CPUs with AVX512-BF16.

    Its first forward in eval mode rounds the block scales to bf16, gradients no longer pass, and
    every later state_dict() (each save of an adapter) quantises the scales once more: the base
    would change under the adapters. Measured with bitsandbytes 0.50.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _int8() -> Any:
    _require_bitsandbytes("8")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _require_bitsandbytes(bits: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"Loading in {bits} bit needs the package bitsandbytes.",
            "Install it with `pip install unlearner[quant]`.",
        )


def _nf4(compute_dtype: torch.dtype) -> Any:
    _require_bitsandbytes("4")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
