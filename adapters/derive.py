"""A new adapter made from others of the store: their exact sum, or its best approximation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.algebra import cat_adapters, factor_adapter
from adapters.errors import UserError
from adapters.manifest import ForgetManifest

if TYPE_CHECKING:
    from adapters.catalog import StoredAdapter
    from adapters.store import AdapterStore


def combine(
    store: AdapterStore,
    refs: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    *,
    rank: int | None = None,
    request_id: str = "",
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
    with tempfile.TemporaryDirectory() as scratch:
        folders = [(store.adapter_path(slug), scale) for slug, scale in parts]
        whole = cat_adapters(folders, Path(scratch) / "cat")
        made = factor_adapter(whole, Path(scratch) / "factored", rank)
        manifest = ForgetManifest(
            request_id=request_id or f"combined-{slugs[0][:5]}-{slugs[-1][:5]}",
            policy="derived",
            base=manifests[0].base,
            parents=tuple(parents),
            supersedes=tuple(slugs),
            lora={"r": made.rank, "alpha": made.rank},
            origin={
                "kind": "sum" if made.exact else "truncated",
                "from": slugs,
                "scales": [scale for _, scale in parts],
                "kept": made.kept,
                "error": made.error,
            },
        )
        return store.publish(made.path, manifest)
