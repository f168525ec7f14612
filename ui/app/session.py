"""What the app works on: one model with its adapters, one store, one line of jobs. No gradio.

The model is loaded by a thread of its own, so the page is there before torch is imported. Every
change of the active adapters is read back from the model's layers before it is shown.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, base_view, load_base, load_tokenizer, resolve_base
from adapters.digests import key_path, store_key
from adapters.environment import SMALL_MODEL
from adapters.errors import UserError
from adapters.lora.stack import StackState, activate, base_only, load_stack, read_state
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from ui.app.data.answers import (
    Answer,
    Frame,
    PairDecoder,
    Sampling,
    Scores,
    Stack,
    judged,
    scores_of,
)
from ui.app.data.library import (
    NEIGHBOURS,
    FiledRequest,
    Library,
    filed_requests,
    marked_rows,
    read_library,
    readable_names,
)
from unlearner.request.rows import Row
from unlearner.tokens.prompts import PromptFormat, Template, prompt_format

LOG = logging.getLogger("unlearner.app")


class Turns:
    """A first-come line. Take a ticket, wait until nobody is ahead, leave when done."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many are in the line, the one being served included."""
        return len(self._line)

    def join(self) -> object:
        """A ticket at the end of the line."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        return ticket

    def leave(self, ticket: object) -> None:
        """Gives up the ticket, served or not; leaving twice does no harm."""
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
                self._changed.notify_all()

    def waiting(self, ticket: object, seconds: float = 0.5) -> Iterator[int]:
        """Yields how many are ahead, now and whenever it changes, and ends when it is 0."""
        last = -1
        while True:
            with self._changed:
                ahead = self._line.index(ticket)
                if ahead == 0:
                    return
                if ahead == last:
                    self._changed.wait(seconds)
                    continue
                last = ahead
            yield ahead

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside it is the caller's turn."""
        ticket = self.join()
        try:
            for _ in self.waiting(ticket):
                continue
            yield
        finally:
            self.leave(ticket)


@dataclass
class Session:
    """The app's one model and store. Open it with `Session(...)`, then `start()`."""

    store_path: Path
    base: BaseSpec | None = None
    data: Path | None = None
    template: Template = "auto"
    system: str | None = None
    turns: Turns = field(default_factory=Turns)
    state: Literal["no base", "loading", "ready", "failed", "resting"] = "no base"
    problem: str = ""
    library: Library = field(default_factory=Library)
    questions: Library | None = None  # in place of those of `data`
    _marked: tuple[Library, bytes, dict[str, tuple[str, Row]]] | None = None
    _model: Any = None
    _fmt: Any = None
    _fingerprint: Any = None
    _quantised: bool = False
    _ready: threading.Event = field(default_factory=threading.Event)
    _starting: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Begins to load base and questions in the background, unless that is under way."""
        with self._starting:
            if self.state in ("loading", "ready"):  # two pages may ask for it at once
                return
            self.state = "loading" if self.base is not None else "no base"
            self._ready.clear()
        threading.Thread(target=self._load, name="load the base", daemon=True).start()

    def _load(self) -> None:
        try:
            if self.questions is not None:
                self.library = self.questions
            elif self.data is not None or self.base is not None:
                self.library = read_library(self.data)
            if self.base is not None:
                self._load_model(self.base)
        except UserError as error:
            self.state, self.problem = "failed", str(error)
        except Exception as error:  # a thread can report to nobody but the page
            self.state, self.problem = "failed", f"{type(error).__name__}: {error}"
            LOG.debug("loading failed", exc_info=error)
        finally:
            self._ready.set()

    def _load_model(self, spec: BaseSpec) -> None:
        folder = resolve_base(spec.name, spec.revision)
        self._fmt = prompt_format(load_tokenizer(str(folder)), self.template, self.system)
        self._fingerprint = fingerprint_base(folder)
        model: Any = load_base(spec)
        if sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
            import torch

            torch.set_num_threads(1)
        self._quantised = base_view(model).get("quantization") not in (None, "none")
        self._model = model
        self.state = "ready"

    def wait(self, seconds: float | None = None) -> bool:
        """Whether loading has ended, well or not, within so many seconds."""
        return self._ready.wait(seconds)

    def rest(self) -> None:
        """Lets go of the model's memory, for a training that needs it; `start` loads it again."""
        import torch

        with self.turns.turn():
            self._model, self.state = None, "resting"
            gc.collect()  # peft's layers and their model hold each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def require(self) -> tuple[Any, PromptFormat]:
        """The model and its prompt format, or a UserError that says why there is none yet."""
        if self.state == "no base":
            raise UserError("No base model was named.", "Start the app with --base B.")
        if self.state == "loading":
            raise UserError("The base is still being loaded.", "Ask again in a moment.")
        if self.state == "resting":
            raise UserError("A training uses the GPU.", "Wait for its end, or cancel it.")
        if self.state == "failed":
            raise UserError(f"The base could not be loaded: {self.problem}")
        return self._model, self._fmt

    @property
    def gpu_bytes(self) -> int:
        """What the model takes of a GPU, 0 where it lies elsewhere."""
        if self._model is None or self._model.device.type == "cpu":
            return 0
        return sum(p.numel() * p.element_size() for p in self._model.parameters())

    def store(self) -> AdapterStore | None:
        """The store, None where there is none yet."""
        if not (self.store_path / "store.json").is_file():
            return None
        return AdapterStore.open(self.store_path)

    def adapters(self) -> list[StoredAdapter]:
        """All adapters of the store."""
        store = self.store()
        return [] if store is None else store.list()

    def filed(self) -> dict[str, FiledRequest]:
        """The filed requests whose questions the data holds, by the slug of their adapter."""
        adapters, library = self.adapters(), self.library
        if not adapters or not library.authors or not key_path().is_file():
            return {}
        key = store_key()
        if self._marked is None or self._marked[0] is not library or self._marked[1] != key:
            self._marked = (library, key, marked_rows(library, key))
        return filed_requests(self._marked[2], adapters, key)

    def names(self) -> dict[str, str]:
        """What people call each adapter, by its slug."""
        return readable_names(self.adapters(), self.filed())

    def askable(self) -> dict[str, tuple[str, tuple[Row, ...]]]:
        """What can be asked about, by its key: its name for people, and its rows.

        Filed requests come first, then authors, of whom those to be forgotten lead.
        """
        filed, names, authors = self.filed(), self.names(), self.library.authors
        found = {
            f"filed: {adapter.label}": (f"To forget: {names[adapter.slug]}", each.rows)
            for adapter in self.adapters()
            if (each := filed.get(adapter.slug)) is not None
        }
        forgotten = {author for each in filed.values() for author in each.authors}
        for author in sorted(authors, key=lambda author: author not in forgotten):
            shown = f"{author} (to be forgotten)" if author in forgotten else author
            found[author] = shown, authors[author]
        return found

    def choices(self) -> list[tuple[str, str]]:
        """Names and keys of `askable`, for a list to choose from."""
        return [(shown, key) for key, (shown, _) in self.askable().items()]

    def examples(self) -> list[tuple[str, Row]]:
        """A question to be forgotten, one of a neighbour and a fact of the world, by kind."""
        filed, authors = self.filed(), self.library.authors
        forgotten = next(iter(filed.values())).rows if filed else next(iter(authors.values()), ())
        rows = [("To be forgotten" if filed else "An author", row) for row in forgotten[1:2]]
        away = {row.question for row in forgotten}
        for kind, names in (
            ("Kept author" if filed else "Another author", [*NEIGHBOURS][:1]),
            ("Real fact", [*NEIGHBOURS][1:]),
        ):
            kept = [row for name in names for row in self.library.neighbours.get(name, ())]
            rows += [(kind, row) for row in kept if row.question not in away][:1]
        return rows

    def filed_stack(self) -> tuple[tuple[str, float], ...]:
        """The store's active stack."""
        store = self.store()
        return () if store is None else tuple((a.slug, a.scale) for a in store.active())

    def on(self) -> list[str]:
        """Slugs of the store's active stack."""
        return [slug for slug, _ in self.filed_stack()]

    def switchable(self) -> list[tuple[str, str]]:
        """Name and slug of all whole adapters that can be switched on, the newest last."""
        off, names = ("quarantined", "purged", "superseded"), self.names()
        return [
            (names[adapter.slug], adapter.slug)
            for adapter in self.adapters()
            if adapter.status not in off and not adapter.problem
        ]

    def use(self, stack: Stack) -> StackState:
        """What the model's layers say after making exactly `stack` active. Only in one's turn.

        Raises:
            UserError: no model; a parent is missing; a file or the base is not as recorded.
        """
        model, _ = self.require()
        store = self.store()
        if not stack or store is None:
            activate(model, [])
        else:
            scales = {slug: float(scale) for slug, scale in stack}
            self._model = load_stack(model, store, list(scales), scales, base=self._fingerprint)
        self._model.eval()  # peft injects its layers in training mode, and refuses mixed batches so
        return read_state(self._model)

    def active(self, stack: Stack) -> list[tuple[str, float]]:
        """`use`: the adapters that the layers say are active, with their strengths."""
        state = self.use(stack)
        return [(name, state.scales[name]) for name in state.active]

    def compare(
        self, question: str, stack: Stack, sampling: Sampling,
        stop: threading.Event | None = None, keep: Frame | None = None,
    ) -> Iterator[Frame]:  # fmt: skip
        """The comparison as it grows: a frame per token, then one with the scores.

        `stop` ends both answers within a token; what was said so far stays. `keep` is an earlier
        comparison: where its base answered the same question in the same way to its end, that
        answer stands and only the stack answers.

        Raises:
            UserError: no question, no model, a stack that cannot be used.
        """
        asked = question.strip()
        if not asked:
            raise UserError("There is no question.", "Choose one or type one.")
        self.require()
        stop = stop or threading.Event()
        same = keep is not None and (keep.question, keep.sampling) == (asked, sampling)
        base = keep.base if keep is not None and same and keep.base_whole else None
        frame = Frame(
            asked, base or Answer(""), Answer(""), tuple(stack), sampling=sampling,
            base_whole=base is not None, kept=base is not None,
        )  # fmt: skip
        ticket = self.turns.join()
        try:
            for ahead in self.turns.waiting(ticket):
                yield dataclasses.replace(frame, stage="waiting", ahead=ahead)
            active = tuple(self.active(stack))
            model, fmt = self.require()
            names = [name for name, _ in active]
            pair = PairDecoder(
                model, fmt, asked, names, sampling, quantised=self._quantised,
                right_only=frame.base_whole,
            )  # fmt: skip
            row = self.library.row(asked)
            truth = row.answer if row else None
            frame = dataclasses.replace(
                frame, stack=active, truth=truth, one_batch=pair.one_batch, stage="answering"
            )
            while not pair.done and not stop.is_set():
                pair.step()
                left, right = pair.answers()
                left = frame.base if frame.base_whole else left
                frame = dataclasses.replace(frame, base=left, unlearned=right)
                yield frame
            if stop.is_set():
                yield dataclasses.replace(frame, stage="stopped")
                return
            yield dataclasses.replace(frame, stage="scoring")
            yield self._scored(frame, row)
        finally:
            self.turns.leave(ticket)

    def _scored(self, frame: Frame, row: Row | None) -> Frame:
        """The frame with both answers judged; the model keeps its stack."""
        base, before = frame.base, None
        if not frame.base_whole:
            with base_only(self._model):
                before = self.teacher_forced([row])[0] if row else None
            base = judged(base, row, before)
        after = before
        if row is not None and (frame.stack or before is None):
            after = self.teacher_forced([row])[0]
        right = judged(frame.unlearned, row, after)
        return dataclasses.replace(frame, base=base, unlearned=right, stage="done", base_whole=True)

    def teacher_forced(self, rows: Sequence[Row]) -> list[Scores]:
        """`scores_of` each row, with what is active now."""
        from evaluation.inference.scoring import score_rows

        model, fmt = self.require()
        return [scores_of(record) for record in score_rows(model, fmt, rows)]
