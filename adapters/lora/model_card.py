"""The model card of released weights, and the machine-readable record beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import sha256_file, write_bytes, write_json
from adapters.environment import utc_now
from adapters.errors import counted
from adapters.lora.merge import MergeResult

if TYPE_CHECKING:
    from adapters.store.manifest import ForgetManifest

WARNING = (
    "Released are only the merged weights. The base together with the adapters is reversible: "
    "whoever holds both, or the base alone, has everything that was to be forgotten. Merged "
    "weights suppress it; relearning and quantisation can bring parts of it back, so measure them "
    "in the form in which they are served. This is no proof of erasure."
)


@dataclass(frozen=True)
class Release:
    """What a release says about itself.

    `before` and `after` are figures of base and merged files under `protocol`, measured again from
    the files written; `candidates` is how many adapters or settings these were selected from, None
    when that is not known.
    """

    base_name: str
    base_digest: str
    adapters: tuple[tuple[ForgetManifest, float], ...]
    merge: MergeResult
    protocol: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    candidates: int | None = None
    formulas: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None


def write_release(release: Release) -> Path:
    """The merged folder, now with README.md (the card) and MERGE_MANIFEST.json (the record)."""
    folder = release.merge.path
    write_bytes(folder / "README.md", release_card(release).encode())
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    names = [name for name in names if name != "MERGE_MANIFEST.json"]
    record = {
        "schema": 1,
        "created": utc_now(),
        "base": {
            "name": release.base_name,
            "revision": release.revision,
            "digest": release.base_digest,
        },
        "adapters": [
            {"slug": m.slug, "scale": scale, "sha256": _weights(m)} for m, scale in release.adapters
        ],
        "dtype": release.merge.dtype,
        "from_4bit_view": release.merge.from_4bit_view,
        "relative_change": release.merge.relative_change,
        "protocol": release.protocol,
        "before": dict(release.before),
        "after": dict(release.after),
        "candidates": release.candidates,
        "files": {name: sha256_file(folder / name) for name in names},
    }
    write_json(folder / "MERGE_MANIFEST.json", record)
    return folder


def release_card(release: Release) -> str:
    """The model card as Markdown: formula as run, parents, seeds, selection, figures, warning."""
    from huggingface_hub import ModelCardData

    merge = release.merge
    view = "the 4-bit (nf4) view of its weights" if merge.from_4bit_view else "its own weights"
    lines = [
        "---",
        ModelCardData(base_model=release.base_name, tags=["machine-unlearning"]).to_yaml(),
        "---",
        "",
        f"# {merge.path.name}",
        "",
        f"Made from `{release.base_name}`"
        + (f" at `{release.revision}`" if release.revision else "")
        + f" (fingerprint `{release.base_digest[:16]}`) by folding "
        f"{counted(len(release.adapters), 'forget adapter')} into {view}:",
        "",
        "    W' = W + sum_i s_i (alpha_i / r_i) B_i A_i",
        "",
        f"summed in float32 and rounded once to {merge.dtype}, on {merge.matrices} matrices. The "
        f"largest relative change of a matrix is {_largest(merge):.3%}.",
        "",
        "## Adapters, in order",
        "",
        "| adapter | scale | objective | alpha / r | seed | parents | forget rows |",
        "|---|---|---|---|---|---|---|",
        *(_adapter_row(manifest, scale) for manifest, scale in release.adapters),
        "",
        *_formulas(release),
        "## Figures",
        "",
        *_figures(release),
        "",
        "## Warning",
        "",
        WARNING,
        "",
    ]
    return "\n".join(lines)


def _adapter_row(manifest: ForgetManifest, scale: float) -> str:
    lora, objective = manifest.lora, manifest.objective
    alpha = lora.get("lora_alpha", lora.get("alpha", "not recorded"))
    rank = lora.get("lora_r", lora.get("r", "not recorded"))
    forget = manifest.data.get("forget", {})
    cells = [
        f"`{manifest.slug}`",
        f"{scale:g}",
        str(objective.get("name", manifest.policy)),
        f"{alpha} / {rank}",
        str(manifest.env.get("seed", "not recorded")),
        ", ".join(f"`{parent}`" for parent in manifest.parents) or "none",
        str(forget.get("n", "not recorded")),
    ]
    return f"| {' | '.join(cells)} |"


def _formulas(release: Release) -> list[str]:
    """One line per objective: its name, its formula when the caller gave it, its parameters."""
    lines = []
    for manifest, _ in release.adapters:
        name = str(manifest.objective.get("name", ""))
        settings = {k: v for k, v in sorted(manifest.objective.items()) if k != "name"}
        parameters = ", ".join(f"{key} = {value}" for key, value in settings.items())
        formula = release.formulas.get(name)
        line = (
            f"- `{name}`: " + (f"{formula}; " if formula else "") + (parameters or "no parameters")
        )
        # Settings that change what is minimised are named there as well.
        for key, value in sorted({**manifest.objective, **manifest.train}.items()):
            if value and key in release.formulas:
                line += f"; {key} = {value}: {release.formulas[key]}"
        if name and line not in lines:
            lines.append(line)
    return ["## Objectives as run", "", *lines, ""] if lines else []


def _figures(release: Release) -> list[str]:
    if not release.after:
        return ["Not measured after merging. Measure these files before you use them."]
    names = list(dict.fromkeys([*release.before, *release.after]))
    table = [
        f"Protocol `{release.protocol or 'not named'}`; after = read back from these files.",
        "",
        "| figure | before | after |",
        "|---|---|---|",
        *(f"| {n} | {_number(release.before, n)} | {_number(release.after, n)} |" for n in names),
        "",
    ]
    if release.candidates is None:
        table.append("How many candidates these adapters were selected from was not recorded.")
    else:
        table.append(f"Selected from {counted(release.candidates, 'candidate')}.")
    return table


def _number(figures: Mapping[str, float], name: str) -> str:
    return f"{figures[name]:.4g}" if name in figures else "not measured"


def _largest(merge: MergeResult) -> float:
    return max(merge.relative_change.values(), default=0.0)


def _weights(manifest: ForgetManifest) -> str:
    entry: dict[str, Any] = manifest.files.get("adapter_model.safetensors", {})
    return str(entry.get("sha256", ""))
