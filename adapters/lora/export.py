"""One adapter for a server: what vLLM, llama.cpp and PEFT take, and how to start them.

None of them runs a stack of adapters in order, so a stack is concatenated first, which is the same
function. Rules read from vLLM's `lora/peft_helper.py` and `config/lora.py`, and
from llama.cpp's `convert_lora_to_gguf.py`.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from adapters.atomic_files import (
    copy_file,
    disk_error,
    fsync_folder,
    remove_tree,
    temporary_name,
    write_bytes,
)
from adapters.base.gguf import dequantised, find_gguf
from adapters.errors import UserError
from adapters.lora.combine import cat_adapters, factor_adapter
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, canonical_config, config_bytes

Target = Literal["peft", "vllm", "llama.cpp"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServingExport:
    """An adapter folder for a server, the command that uses it, and what to know about it."""

    path: Path
    target: str
    rank: int
    command: str
    notes: tuple[str, ...]
    exact: bool = True


def export_serving(
    adapters: list[tuple[Path, float]],
    out: Path,
    *,
    target: Target = "peft",
    base_name: str,
    rank: int | None = None,
    trained_on: str = "none",
) -> ServingExport:
    """The new folder `out` with the whole stack as one adapter that `target` loads.

    `base_name` is written as base_model_name_or_path; vLLM compares it with the name it serves,
    letter by letter. `rank` truncates (another adapter: evaluate it). `trained_on` is the base's
    quantization, for the notes.
    """
    if target not in get_args(Target):
        raise UserError(f"{target!r} is no target.", f"Use one of {', '.join(get_args(Target))}.")
    if not base_name:
        raise UserError("The base's name is missing.", "Give the name under which it is served.")
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already.", "Name a folder that does not.")
    aside = out.with_name(temporary_name(out.name))
    try:
        aside.mkdir(parents=True)
        summed = cat_adapters(adapters, aside / "sum")
        factored = factor_adapter(summed, aside / "factored", rank)
        config = _config(factored.path, base_name)
        final = aside / "final"
        final.mkdir()
        copy_file(factored.path / WEIGHTS_NAME, final / WEIGHTS_NAME)
        write_bytes(final / CONFIG_NAME, config_bytes(config))
        fsync_folder(final)
        os.rename(final, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        remove_tree(aside)
    notes = _notes(target, factored.rank, trained_on)
    if not factored.exact:
        kept = f"Truncated to rank {factored.rank}: {factored.kept:.1%} of the update is kept"
        notes.insert(0, f"{kept}. This is another adapter: evaluate it before use.")
    command = _command(target, out, base_name, factored.rank)
    return ServingExport(out, target, factored.rank, command, tuple(notes), factored.exact)


def max_lora_rank(rank: int) -> int:
    """The smallest value of vLLM's --max-lora-rank that takes `rank`."""
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= rank]
    if not fitting:
        raise UserError(
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, the stack has {rank}.",
            "Truncate it with a rank, or merge it into the weights.",
        )
    return fitting[0]


def _config(folder: Path, base_name: str) -> dict[str, Any]:
    from adapters.atomic_files import read_json

    config = canonical_config(read_json(folder / CONFIG_NAME), base_name)
    # A server's own name may be a path there: unlike in the store it has to stay as given.
    return {**config, "base_model_name_or_path": base_name}


def _command(target: str, out: Path, base_name: str, rank: int) -> str:
    if target == "vllm":
        return (
            f"vllm serve {base_name} --enable-lora --max-lora-rank {max_lora_rank(rank)} "
            f"--lora-modules forget={out}"
        )
    if target == "llama.cpp":
        file, config = _gguf_and_config(base_name)
        converted = shlex.quote(f"{out}.gguf")
        return (
            f"python convert_lora_to_gguf.py {config} --outfile {converted} {shlex.quote(str(out))}"
            f" && llama-cli -m {file} --lora {converted}"
        )
    return f"PeftModel.from_pretrained(base, {str(out)!r})"


def _gguf_and_config(base_name: str) -> tuple[str, str]:
    """The GGUF that llama.cpp serves, and the flag that gives its converter the base's config.

    The converter reads config.json alone: of a folder with --base, of the hub with --base-model-id.
    """
    try:
        file = find_gguf(base_name)
    except UserError:
        return shlex.quote(base_name), "--base FOLDER_WITH_CONFIG_JSON"
    if file is not None:
        return shlex.quote(str(file)), f"--base {shlex.quote(str(dequantised(file)))}"
    flag = "--base" if Path(base_name).is_dir() else "--base-model-id"
    return "BASE.gguf", f"{flag} {shlex.quote(base_name)}"


def _notes(target: str, rank: int, trained_on: str) -> list[str]:
    notes = ["A request that does not name the adapter gets the base, which forgot nothing."]
    if target == "vllm":
        notes.append("Requests must ask for the model name `forget`; one adapter per request.")
        if max_lora_rank(rank) != rank:
            notes.append(f"Rank {rank} is served with --max-lora-rank {max_lora_rank(rank)}.")
    if target == "llama.cpp":
        notes.append("The served base is usually quantised: evaluate the pair as it is served.")
    if trained_on not in ("none", ""):
        notes.append(
            f"The adapter was trained on the base in {trained_on}: on another view of the base its "
            "effect differs slightly, so measure it there."
        )
    return notes
