"""Which stack follows from activating and reverting, and what becomes of every adapter's status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapters.errors import UserError
from adapters.lora.stack import MAX_SCALE
from adapters.store.catalog import Catalog, require_ok
from adapters.store.journal import Journal
from adapters.store.states import IN_STACK, ActiveAdapter, StoreState, after


@dataclass(frozen=True)
class StackChange:
    """The stack after a change, and every adapter whose status changed, with its new status."""

    stack: tuple[ActiveAdapter, ...]
    changed: dict[str, str]

    @property
    def stale(self) -> tuple[str, ...]:
        """Adapters that now run on another stack than they were trained on."""
        return tuple(slug for slug, status in self.changed.items() if status == "stale")


def activate_stack(
    journal: Journal,
    catalog: Catalog,
    state: StoreState,
    slugs: list[str],
    scales: Mapping[str, float],
    *,
    with_parents: bool,
    only: bool,
) -> StackChange:
    """Add `slugs` to the stack. Call it under the lock."""
    for slug, scale in scales.items():
        if type(scale) not in (int, float) or not 0.0 <= scale <= MAX_SCALE:
            raise UserError(f"The scale {scale} is outside 0 to {MAX_SCALE}.", "Use 1 as trained.")
        if slug not in slugs:
            raise UserError(f"A scale is given for {slug}, which is not activated.", "Drop it.")
    if with_parents:
        slugs, scales = _with_parents(catalog, state, slugs, scales)
    for slug in slugs:
        after("activate", slug, state.status[slug])
        require_ok(catalog.verify(slug, state))
    replaced = {old for slug in slugs for old in catalog.manifest(slug).supersedes} - set(slugs)
    kept = [] if only else [active for active in state.stack if active.slug not in replaced]
    stack = _placed(catalog, kept, slugs, scales)
    _require_parents(catalog, slugs, [active.slug for active in stack])
    superseded = [old for old in sorted(replaced) if state.status.get(old) in IN_STACK]
    return restack(journal, catalog, state, "activate", slugs, stack, superseded=superseded)


def restack(
    journal: Journal,
    catalog: Catalog,
    state: StoreState,
    action: str,
    slugs: Sequence[str],
    stack: Sequence[ActiveAdapter],
    *,
    superseded: Sequence[str] = (),
    reason: str = "",
) -> StackChange:
    """Commit a new stack; statuses follow: left, joined, stranded without parents, settled."""
    order = [active.slug for active in stack]
    status = {slug: after(action, slug, state.status[slug]) for slug in slugs}
    status.update({old: after("supersede", old, state.status[old]) for old in superseded})
    for slug in set(state.stack_slugs) - set(order) - set(status):
        status[slug] = after("revert", slug, state.status[slug])
    for position, slug in enumerate(order):
        now = status.get(slug, state.status[slug])
        whole = _as_trained(catalog, slug, stack[:position])
        if not whole and now != "stale":
            status[slug] = after("strand", slug, now)
        elif whole and now == "stale":
            status[slug] = after("settle", slug, now)
    changed = {slug: new for slug, new in status.items() if state.status[slug] != new}
    journal.commit(state, action, slugs, status=changed, stack=stack, reason=reason or None)
    return StackChange(tuple(stack), changed)


def _as_trained(catalog: Catalog, slug: str, before: Sequence[ActiveAdapter]) -> bool:
    """Whether its parents act before it, in the order and strength it was trained on."""
    parents, scales = catalog.parents_of(slug)
    found = [active for active in before if active.slug in parents]
    return tuple(a.slug for a in found) == parents and all(
        abs(a.scale - scales.get(a.slug, 1.0)) < 1e-9 for a in found
    )


def _with_parents(
    catalog: Catalog, state: StoreState, slugs: Sequence[str], scales: Mapping[str, float]
) -> tuple[list[str], dict[str, float]]:
    """`slugs` with missing parents before them, at the strength they had in training."""
    ordered: dict[str, None] = {}
    wanted = dict(scales)
    for slug in slugs:
        parents, trained = catalog.parents_of(slug)
        for parent in parents:
            ordered[parent] = None
            if parent not in slugs and parent not in state.stack_slugs:
                wanted.setdefault(parent, trained.get(parent, 1.0))
        ordered[slug] = None
    return list(ordered), wanted


def _placed(
    catalog: Catalog,
    kept: Sequence[ActiveAdapter],
    slugs: Sequence[str],
    scales: Mapping[str, float],
) -> list[ActiveAdapter]:
    """`kept` with `slugs` added at the end, each before the first of its children."""
    stack = [replace(active, scale=float(scales.get(active.slug, active.scale))) for active in kept]
    for slug in slugs:
        if any(active.slug == slug for active in stack):
            continue
        children = [i for i, a in enumerate(stack) if slug in catalog.parents_of(a.slug)[0]]
        place = min(children, default=len(stack))
        stack.insert(place, ActiveAdapter(slug, float(scales.get(slug, 1.0))))
    return stack


def _require_parents(catalog: Catalog, slugs: Sequence[str], order: Sequence[str]) -> None:
    for slug in slugs:
        before = order[: order.index(slug)]
        missing = [p for p in catalog.manifest(slug).parents if p not in before]
        if missing:
            raise UserError(
                f"Adapter {slug} was trained on top of {', '.join(missing)}, which is not active "
                "before it.",
                f"Run `unlearner adapters activate {' '.join([*missing, slug])}`.",
            )
