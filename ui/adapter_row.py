"""An adapter as one row of JSON: what the command line and the app show of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter


def adapter_row(adapter: StoredAdapter) -> dict[str, Any]:
    """An adapter as a table row; counts and settings, never a text."""
    manifest = adapter.manifest
    return {
        "name": adapter.slug,
        "label": adapter.label,
        "status": adapter.status,
        "scale": adapter.scale,
        "rows": manifest.data.get("forget", {}).get("n"),
        "objective": manifest.objective.get("name"),
        "lora_r": manifest.lora.get("r", manifest.lora.get("lora_r")),
        "parents": list(manifest.parents),
        "policy": manifest.policy,
        "bytes": adapter.size,
        "created": manifest.created[:19],
        "problem": adapter.problem or None,
    }
