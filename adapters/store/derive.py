"""New adapters made from stored ones: exact sums, low-rank approximations, rescaled copies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.errors import UserError
from adapters.lora.combine import cat_adapters, factor_adapter
from adapters.lora.format import read_adapter
from adapters.lora.stack import MAX_SCALE
from adapters.store.manifest import ForgetManifest

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter
    from adapters.store.store import AdapterStore


def combine(
    store: AdapterStore,
    refs: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    *,
    rank: int | None = None,
    label: str = "",
) -> StoredAdapter:
    """The sum of adapters (the active stack by default) as one new adapter, status ready.

    It supersedes its parts, so that activating it takes their place. With a `rank` below the sum's
    own it is another adapter: its `origin` says `truncated` and how much of the update is kept,
    and no evaluation of its parts is valid for it.
    """
    if refs is None:
        parts = [(active.slug, active.scale) for active in store.active()]
    else:
        parts = [(store.get(ref).slug, float((scales or {}).get(ref, 1.0))) for ref in refs]
    if not parts:
        raise UserError("There is nothing to combine.", "Name adapters, or activate some.")
    manifests = [store.require_whole(slug).manifest for slug, _ in parts]
    slugs = [slug for slug, _ in parts]
    parents = dict.fromkeys(p for m in manifests for p in m.parents if p not in slugs)
    parent_scales = _parent_scales(manifests, parents)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [(store.adapter_path(slug), scale) for slug, scale in parts]
        concatenated = cat_adapters(folders, Path(scratch) / "cat")
        factored = factor_adapter(concatenated, Path(scratch) / "factored", rank)
        manifest = ForgetManifest(
            request_id=f"combined-{slugs[0][:5]}-{slugs[-1][:5]}",
            label=label,
            policy="derived",
            base=manifests[0].base,
            parents=tuple(parents),
            parent_scales=parent_scales,
            supersedes=tuple(slugs),
            lora={"r": factored.rank, "alpha": factored.rank},
            origin={
                "kind": "sum" if factored.exact else "truncated",
                "from": slugs,
                "scales": [scale for _, scale in parts],
                "kept": factored.kept,
                "error": factored.error,
            },
        )
        return store.publish(factored.path, manifest)


def _parent_scales(manifests: Sequence[ForgetManifest], parents: Iterable[str]) -> dict[str, float]:
    """Strength of each parent outside of the sum, where it is not 1; the parts must agree."""
    scales = {}
    for parent in parents:
        trained = {m.parent_scales.get(parent, 1.0) for m in manifests if parent in m.parents}
        if len(trained) > 1:
            raise UserError(
                f"The adapters were trained on {parent} at the scales "
                f"{', '.join(f'{scale:g}' for scale in sorted(trained))}.",
                f"Combine them together with {parent}, or separately.",
            )
        scale = trained.pop()
        if scale != 1.0:
            scales[parent] = scale
    return scales


def scaled(store: AdapterStore, ref: str, scale: float) -> StoredAdapter:
    """A new adapter: the original at another strength; status ready.

    `B' = scale * alpha/r * B` with `alpha' = r`, one float32 rounding per weight, so that it
    computes at strength 1 what the original computes at `scale`. It supersedes the original,
    forgets the same rows and has the same parents.

    Args:
        store: where the original lies and the new one is published.
        ref: slug, label or request id.
        scale: of the trained strength, above 0 and at most 1.5, not 1.

    Raises:
        UserError: a scale that gives nothing new, or none at all.
    """
    original = store.require_whole(ref)
    if scale == 0:
        raise UserError(
            f"At scale 0 {original.slug} does nothing: that is no adapter.",
            f"Switch it off with `unlearner adapters revert {original.slug}`.",
        )
    if scale == 1:
        raise UserError(
            f"At scale 1 {original.slug} is what it is: there is nothing to publish.",
            f"Use {original.slug} itself.",
        )
    if not 0 < scale <= MAX_SCALE:
        raise UserError(f"The scale {scale:g} is outside 0 to {MAX_SCALE}.", "Use 1 as trained.")
    manifest = original.manifest
    with tempfile.TemporaryDirectory() as scratch:
        folder = cat_adapters([(original.path, scale)], Path(scratch) / "scaled")
        rank = int(read_adapter(folder).config["r"])
        scaled_manifest = ForgetManifest(
            request_id=f"scaled-{original.slug.split('_')[0]}",
            label=f"{original.label[:60]} at {scale:g}",
            policy="derived",
            data=manifest.data,
            base=manifest.base,
            parents=manifest.parents,
            parent_scales=manifest.parent_scales,
            supersedes=(original.slug,),
            lora={"r": rank, "alpha": rank},
            origin={"kind": "scaled", "from": [original.slug], "scales": [scale]},
        )
        return store.publish(folder, scaled_manifest)
