"""What a page or a script can ask of the app, as plain functions from data to data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from adapters.store.store import AdapterStore
from ui.app.data.answers import Sampling
from ui.app.data.library import adapter_row
from ui.app.data.sheet import fill, tally
from ui.app.session import Session

if TYPE_CHECKING:
    from ui.app.data.runs import Sources
    from ui.app.jobs import Jobs


class Actions:
    """The functions behind the page; `gradio_client` calls these by their names."""

    def __init__(
        self, session: Session, jobs: Jobs | None = None,
        sources: Callable[[], Sources] | None = None,
    ) -> None:  # fmt: skip
        """`jobs` and `sources` are what the page has beside its model: trainings, evaluations."""
        self.session = session
        self._jobs, self._sources = jobs, sources

    def compare(
        self, question: str, adapters: list[str] | None = None,
        strengths: dict[str, float] | None = None, temperature: float = 0.0, seed: int = 0,
        max_new: int = 200,
    ) -> dict[str, Any]:  # fmt: skip
        """Both answers to a question with their figures.

        Args:
            question: of the data, then it is scored, or any other.
            adapters: slugs or labels in order; None is the store's active stack, [] the base.
            strengths: by the same names; as filed, or 1, where not given.
            temperature, seed, max_new: of the answers; 0 is greedy.
        """
        stack = self.stack_of(adapters, strengths)
        sampling = Sampling(float(temperature), int(seed), int(max_new))
        self.session.wait()
        *_, last = self.session.compare(question, stack, sampling)
        return dataclasses.asdict(last)

    def stack_of(
        self, adapters: list[str] | None, strengths: dict[str, float] | None = None
    ) -> list[tuple[str, float]]:
        """Slugs with strengths, in order."""
        if adapters is None:
            return list(self.session.filed_stack())
        if not adapters:
            return []
        store = self._store()
        given = {**dict(self.session.filed_stack()), **(strengths or {})}
        slugs = {ref: store.get(ref).slug for ref in adapters}
        return [(slug, float(given.get(ref, given.get(slug, 1.0)))) for ref, slug in slugs.items()]

    def stack(self) -> dict[str, Any]:
        """The store's adapters, and what the model's layers say is active."""
        rows = [adapter_row(adapter) for adapter in self.session.adapters()]
        return {"adapters": rows, "read_back": self.read_back()}

    def read_back(self) -> list[list[Any]] | None:
        """Active adapters and strengths of the filed stack, read from the model; None without."""
        if self.session.state != "ready":
            return None
        with self.session.turns.turn():
            return [list(pair) for pair in self.session.active(self.session.filed_stack())]

    def activate(self, ref: str, strength: float = 1.0) -> dict[str, Any]:
        """Switches an adapter on in the store, with its parents, and reads the model back."""
        store = self._store()
        slug = store.get(ref).slug
        store.activate([slug], {slug: float(strength)}, with_parents=True)
        return self.stack()

    def revert(self, ref: str) -> dict[str, Any]:
        """Switches an adapter off in the store: exactly the model before."""
        self._store().revert(ref, reason="app")
        return self.stack()

    def clear(self) -> dict[str, Any]:
        """Switches everything off: the bare base."""
        self._store().deactivate_all(reason="app")
        return self.stack()

    def sheet(
        self, author: str, adapters: list[str] | None = None, neighbours: int = 5,
        strengths: dict[str, float] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The author's questions and their neighbours, answered and scored both ways."""
        self.session.wait()
        stack = self.stack_of(adapters, strengths)
        *_, last = fill(self.session, author, stack, neighbours=int(neighbours))
        rows = last.rows
        return {"rows": [dataclasses.asdict(row) for row in rows], "tally": tally(rows)}

    def runs(self) -> dict[str, Any]:
        """The Runs tab: every evaluation and probe that was made before."""
        if self._sources is None:
            return {"table": [], "probes": {}, "notes": []}
        found = self._sources()
        runs = found.runs()
        probes = dataclasses.asdict(found.probes())
        return {"table": runs.table, "probes": probes, "notes": runs.notes}

    def jobs(self) -> list[dict[str, Any]]:
        """Trainings as they stand: title, status, how many are ahead, the last step."""
        views = self._jobs.views() if self._jobs is not None else []
        return [
            {"name": view.name, "title": view.title, "status": view.status,
             "ahead": view.position, "last": view.steps[-1] if view.steps else None}
            for view in views
        ]  # fmt: skip

    def _store(self) -> AdapterStore:
        store = self.session.store()
        if store is None:
            raise UserError("There is no store yet.", "File a request first.")
        return store
