"""What a page or a script can ask of the app, as plain functions from data to data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from ui.views import command

if TYPE_CHECKING:
    from ui.session import Frame, Session


class Actions:
    """The functions behind the page; `gradio_client` calls these by their names."""

    def __init__(self, session: Session) -> None:
        self.session = session

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
        from ui.decoding import Sampling

        stack = self.stack_of(adapters, strengths)
        sampling = Sampling(float(temperature), int(seed), int(max_new))
        self.session.wait()
        last: Frame | None = None
        for frame in self.session.compare(question, stack, sampling):
            last = frame
        assert last is not None  # a comparison ends with a frame, or raises
        return frame_json(last)

    def stack_of(
        self, adapters: list[str] | None, strengths: dict[str, float] | None = None
    ) -> list[tuple[str, float]]:
        """Slugs with strengths, in order."""
        if adapters is None:
            return list(self.session.filed_stack())
        store = self.session.store()
        if not adapters:
            return []
        if store is None:
            raise UserError("There is no store, so there is no adapter.", "File a request first.")
        given = {**dict(self.session.filed_stack()), **(strengths or {})}
        slugs = {ref: store.get(ref).slug for ref in adapters}
        return [(slug, float(given.get(ref, given.get(slug, 1.0)))) for ref, slug in slugs.items()]

    def stack(self) -> dict[str, Any]:
        """The store's adapters, and what the model's layers say is active."""
        from ui.commands_store import adapter_row

        rows = [adapter_row(adapter) for adapter in self.session.adapters()]
        return {"adapters": rows, "read_back": self.read_back()}

    def read_back(self) -> list[list[Any]] | None:
        """Active adapters and strengths of the filed stack, read from the model; None without."""
        if self.session.state != "ready":
            return None
        state = self.session.read_back(self.session.filed_stack())
        return [[name, state.scales[name]] for name in state.active]

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
        self, author: str, adapters: list[str] | None = None, neighbours: int = 5
    ) -> dict[str, Any]:
        """The author's questions and their neighbours, answered and scored both ways."""
        from ui.sheet import fill, tally

        self.session.wait()
        stack = self.stack_of(adapters)
        *_, (rows, _) = fill(self.session, author, stack, neighbours=int(neighbours))
        return {"rows": [dataclasses.asdict(row) for row in rows], "tally": tally(rows)}

    def _store(self) -> Any:
        store = self.session.store()
        if store is None:
            raise UserError("There is no store yet.", "File a request first.")
        return store

    def change_command(self, action: str, ref: str = "", strength: float = 1.0) -> str:
        """The command that does the same as a button of the Stack tab."""
        tail = ["--store", self.session.store_path]
        if action == "activate":
            scales = [] if strength == 1.0 else ["--scales", f"{strength:g}"]
            return command("adapters", "activate", ref, "--with-parents", *scales, *tail)
        if action == "clear":
            return command("adapters", "revert", "--all", *tail)
        return command("adapters", "revert", ref, *tail)


def frame_json(frame: Frame) -> dict[str, Any]:
    """A comparison as JSON."""
    return dataclasses.asdict(frame)
