"""The Python API: one base in memory, requests, and the adapters that forget them.

    base = load_base("HuggingFaceTB/SmolLM2-135M-Instruct")
    adapter = forget(Request.from_tofu("forget05"), base, store="my-store")
    with adapter.active(base):
        ...

Errors name parameters; the libraries below also serve the command line, whose flags are called
alike.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import unlearner.request.rows as rows_
from adapters.base.fingerprint import BaseFingerprint, fingerprint_base
from adapters.base.load import Attention, BaseSpec, Dtype, load_tokenizer, resolve_base
from adapters.base.load import load_base as load_model
from adapters.errors import UserError, did_you_mean
from adapters.lora.stack import detach, load_stack
from adapters.store.store import AdapterStore
from unlearner import distributed
from unlearner.config import LoraShape, ObjectiveConfig, TrainConfig, make_config, streams_of
from unlearner.request.formats import HUB_PREFIX, Columns, rows_of
from unlearner.request.rows import Row
from unlearner.request.sources import parse_request, refuse_overlap, rows_named
from unlearner.request.tofu import load_refusals, split_name
from unlearner.tokens.prompts import PromptFormat, Template, prompt_format

if TYPE_CHECKING:
    from adapters.store.catalog import StoredAdapter
    from unlearner.run import RunOptions

RowsLike = str | Path | Iterable[Any]
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")


@contextmanager
def parameters_named() -> Iterator[None]:
    """Inside, errors that name a flag of the command line name the parameter instead."""
    try:
        yield
    except UserError as error:
        error.problem, error.fix = (
            _FLAG.sub(lambda flag: f"`{flag[1].replace('-', '_')}`", text)
            for text in (error.problem, error.fix)
        )
        error.args = (error.problem,)
        raise


@dataclass
class Base:
    """A base model in memory; `forget`, `evaluate` and `ForgetAdapter.active` take it.

    Attributes:
        spec: which base, and how it is held.
        model: transformers' model, with the adapters of `stack` on it.
        fmt: how questions and answers become tokens.
        fingerprint: of its files; an adapter belongs to one base.
        stack: slug and strength of the active adapters, in order.
    """

    spec: BaseSpec
    model: Any = field(repr=False)
    fmt: PromptFormat = field(repr=False)
    fingerprint: BaseFingerprint = field(repr=False)
    stack: tuple[tuple[str, float], ...] = ()

    def require_bare(self, what: str) -> None:
        """Raises UserError while adapters are active."""
        if self.stack:
            raise UserError(
                f"{what} needs the bare base, and {self.stack[-1][0]} is active.",
                "Leave the `with adapter.active(base):` block first.",
            )


def load_base(
    name: str | Path,
    *,
    revision: str | None = None,
    load_in_4bit: bool = False,
    dtype: Dtype = "auto",
    device: str = "auto",
    attention: Attention = "auto",
    template: Template = "auto",
    system: str | None = None,
) -> Base:
    """The base in memory, frozen, with its prompts.

    Args:
        name: hub id, folder or GGUF file.
        revision: commit, tag or branch of a hub base.
        load_in_4bit: hold it as nf4 (needs bitsandbytes).
        dtype: "auto" is bfloat16 on a GPU that computes in it, float32 on a CPU.
        device: "auto", "cpu", "cuda" or "cuda:N".
        attention: kernel, see `adapters.base.load.load_base`.
        template: "auto", "llama2", "chat" or "open-unlearning", see `prompt_format`.
        system: system prompt of every row; "none" removes the template's own.

    Raises:
        UserError: there is no such base, or it cannot be loaded so.
    """
    spec = BaseSpec(str(name), revision, dtype, load_in_4bit, device, attention)
    with parameters_named():
        folder = resolve_base(spec.name, revision)
        fmt = prompt_format(load_tokenizer(str(folder)), template, system)
        return Base(spec, load_model(spec), fmt, fingerprint_base(folder))


class Request(rows_.Request):
    """What is to be forgotten, and what must stay.

    Attributes:
        name: what it was made from.
        kind: "tofu-split", "tofu-author" or "jsonl".
        rows: the rows to forget.
        retain: the rows to keep.
        others: whose answers are alternates; without them those of `retain`.
    """

    @classmethod
    def from_tofu(
        cls, split: str, *, data: str | Path | None = None, retain: RowsLike | None = None
    ) -> Request:
        """A forget split of TOFU (`forget05`), or one author (`author=Hina Ameen`).

        Args:
            split: with or without `tofu:` before it.
            data: folder of TOFU's JSON-lines files, else the hub.
            retain: by default the rest of TOFU.
        """
        with parameters_named():
            found = parse_request(f"tofu:{split_name(split)}", None if data is None else Path(data))
            return cls._made(found.name, found.kind, found.rows, found.retain, retain, data)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        retain: RowsLike | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
        data: str | Path | None = None,
    ) -> Request:
        """The rows of a JSON-lines, JSON, CSV, TSV or Parquet file, or of `hub:OWNER/NAME`.

        Args:
            path: of the rows to forget.
            retain: rows to keep: a file, a TOFU split, or rows; by default the rest of TOFU where
                `data` is given.
            question_column: column of the questions; by default found by its usual names.
            answer_column: column of the answers.
            data: folder of TOFU's JSON-lines files.
        """
        columns = Columns(question_column, answer_column)
        with parameters_named():
            found = parse_request(str(path), None if data is None else Path(data), columns=columns)
            return cls._made(str(path), "jsonl", found.rows, found.retain, retain, data, columns)

    @classmethod
    def from_rows(cls, rows: Iterable[Any], *, retain: RowsLike | None = None) -> Request:
        """Rows in memory: dicts with `question` and `answer`, or pairs of both."""
        with parameters_named():
            return cls._made("rows", "jsonl", rows_in_memory(rows, "rows"), (), retain, None)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        retain: RowsLike | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
    ) -> Request:
        """The rows of a `datasets.Dataset`, or of a hub data set `OWNER/NAME:SPLIT`."""
        if isinstance(dataset, str):
            name = f"{HUB_PREFIX}{dataset.removeprefix(HUB_PREFIX)}"
            return cls.from_file(
                name, retain=retain, question_column=question_column, answer_column=answer_column
            )
        columns = Columns(question_column, answer_column)
        with parameters_named():
            rows = rows_in_memory(dataset, "dataset", columns)
            return cls._made("dataset", "jsonl", rows, (), retain, None, columns)

    @classmethod
    def _made(
        cls,
        name: str,
        kind: str,
        rows: Sequence[Row],
        rest: Sequence[Row],
        retain: RowsLike | None,
        data: str | Path | None,
        columns: Columns | None = None,
    ) -> Request:
        if retain is not None:
            usual = replace(columns or Columns(), optional=True)
            if isinstance(retain, str | Path):
                folder = None if data is None else Path(data)
                rest = rows_named(str(retain), folder, columns=usual)
            else:
                rest = rows_in_memory(retain, "retain", usual)
            refuse_overlap(rows, rest, name, "retain")
        return cls(name, kind, tuple(rows), tuple(rest))

    def __repr__(self) -> str:
        return f"Request({self.name!r}: {len(self.rows)} to forget, {len(self.retain)} to keep)"


def rows_in_memory(rows: Iterable[Any], what: str, columns: Columns | None = None) -> list[Row]:
    """Rows, dicts or pairs as rows.

    Raises:
        UserError: naming every row that is none.
    """
    records: list[tuple[str, Any]] = []
    ready: list[Row] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Row):
            ready.append(row)
        elif isinstance(row, tuple | list) and len(row) == 2:
            records.append((f"row {number}", dict(zip(("question", "answer"), row, strict=True))))
        else:
            records.append((f"row {number}", row))
    return [*ready, *rows_of(what, records, columns=columns)] if records else ready


@dataclass(frozen=True, repr=False)
class ForgetAdapter:
    """One adapter of a store.

    Attributes:
        slug: its name in the store.
        store: where it is.
    """

    slug: str
    store: AdapterStore

    @property
    def stored(self) -> StoredAdapter:
        """Manifest, files, status and strength, as the store has them now."""
        return self.store.get(self.slug)

    @property
    def path(self) -> Path:
        """Its folder, which `PeftModel.from_pretrained(base, path)` loads too."""
        return self.stored.path

    @contextmanager
    def active(self, base: Base, *, scale: float = 1.0) -> Iterator[Base]:
        """Inside, the adapter acts on `base`, on top of those it was trained on.

        Afterwards the base is bare again and gives the same logits as before, bit for bit.

        Args:
            base: the base it was trained on.
            scale: its strength, 0 to 1.5.

        Raises:
            UserError: adapters are active on `base` already, or the adapter is damaged.
            BaseMismatch: it belongs to another base.
        """
        manifest = self.stored.manifest
        stack = {slug: manifest.parent_scales.get(slug, 1.0) for slug in manifest.parents}
        stack[self.slug] = scale
        with active_stack(base, self.store, stack):
            yield base

    def activate(self, *, scale: float | None = None) -> None:
        """Put it on the store's stack: later requests are trained on top of it."""
        with parameters_named():
            self.store.activate([self.slug], None if scale is None else {self.slug: scale})

    def revert(self, reason: str = "") -> None:
        """Take it off the store's stack."""
        with parameters_named():
            self.store.revert(self.slug, reason)

    def _facts(self) -> dict[str, Any]:
        stored = self.stored
        manifest = stored.manifest
        return {
            "adapter": self.slug,
            "label": manifest.label or None,
            "status": stored.status,
            "rows forgotten": manifest.data.get("forget", {}).get("n"),
            "objective": manifest.objective.get("name"),
            "steps": manifest.train.get("steps"),
            "on top of": ", ".join(manifest.parents) or None,
            "size": f"{stored.size / 1e6:.2f} MB",
        }

    def __repr__(self) -> str:
        facts = {key: value for key, value in self._facts().items() if value is not None}
        return f"ForgetAdapter({', '.join(f'{key} {value}' for key, value in facts.items())})"

    def _repr_html_(self) -> str:
        return html_table(self._facts().items())


@contextmanager
def active_stack(base: Base, store: AdapterStore, stack: Mapping[str, float]) -> Iterator[None]:
    """Inside, the adapters of `stack` act on `base` in order; the bare base again afterwards."""
    base.require_bare("Activating an adapter")
    bare = base.model
    try:
        with parameters_named():
            base.model = load_stack(bare, store, list(stack), stack, base=base.fingerprint)
        base.stack = tuple(stack.items())
        yield
    finally:
        base.model, base.stack = detach(bare), ()


def load_adapter(store: str | Path, ref: str) -> ForgetAdapter:
    """An adapter of a store by its slug, the unique start of it, or its label."""
    with parameters_named():
        opened = AdapterStore.open(Path(store))
        return ForgetAdapter(opened.get(ref).slug, opened)


def forget(
    request: rows_.Request,
    base: Base,
    *,
    store: str | Path = "forget-store",
    objective: str = "simnpo",
    label: str = "",
    on_stack: bool | None = None,
    guard: Sequence[rows_.Request] = (),
    target: float | Literal["auto"] | None = None,
    unseen: Iterable[Any] = (),
    neighbours: int | None = None,
    resume: bool = False,
    restart: bool = False,
    data: str | Path | None = None,
    progress: bool | Callable[[Mapping[str, Any]], None] | None = None,
    **config: Any,
) -> ForgetAdapter:
    """Train an adapter that forgets `request`, and store it; the base is bare again afterwards.

    Args:
        request: what to forget, and what to keep.
        base: from `load_base`.
        store: folder of the adapters; it is made where it is missing.
        objective: a key of `unlearner.objectives.registry.OBJECTIVES`.
        label: a name for people; it is stored in the clear.
        on_stack: train on top of the store's active adapters; None does so where some are active.
        guard: earlier requests of the stack, which must stay forgotten.
        target: mean forget NLL per token to stop at; None measures it on `unseen` in simnpo and
            npo, 0 is none.
        unseen: rows of the same kind that the base never saw; by default alternate answers.
        neighbours: keep only so many of the retain rows, those nearest to the request.
        resume: continue an interrupted run of the same request and settings.
        restart: discard such a run.
        data: folder of TOFU's files, for the refusals of the objectives idk and dpo.
        progress: show a bar (None: on a terminal and in a notebook), or what gets the events of
            `unlearner.run.unlearn`.
        **config: settings by name, such as `learning_rate` (see `unlearner.config`); batch,
            learning rate and weights that are not given are chosen for the rows and the model.

    Raises:
        UserError: an unknown setting or a value that cannot be used, rows that cannot be trained
            on, a store of another base.
        DoesNotFit: it needs more memory than there is.
        Interrupted: stopped by Ctrl-C; `resume` continues.
    """
    from unlearner.run import RunOptions, unlearn

    base.require_bare("Training")
    kinds = (ObjectiveConfig, LoraShape, TrainConfig)
    known = [f.name for kind in kinds for f in fields(kind) if f.name not in ("name", "target")]
    for name in config:
        if name not in known:
            raise UserError(f"forget() has no setting {name!r}.", did_you_mean(name, known))
    with parameters_named(), progress_bar("forget", progress) as report:
        settings = make_config(objective, **config)
        folder = None if data is None else Path(data)
        refusals = load_refusals(folder) if "refusal" in streams_of(settings.objective) else ()
        options = RunOptions(
            on_stack=on_stack,
            label=label,
            resume=resume,
            restart=restart,
            template=base.fmt.name,
            system=base.fmt.system,
            refusals=refusals,
            neighbours=neighbours,
            guard=[row for past in guard for row in past.rows],
            given=tuple(config),
            target=target,
            unseen=rows_in_memory(unseen, "unseen"),
            summarise=True,
        )
        opened = AdapterStore.open(Path(store), create=True)
        stored = unlearn(
            request, base.spec, settings, opened, options, model=base.model, on_progress=report
        )
    if distributed.rank() == 0:
        _keep_settings(request, base, options, stored, opened)
    return ForgetAdapter(stored.slug, opened)


def _keep_settings(
    request: rows_.Request,
    base: Base,
    options: RunOptions,
    stored: StoredAdapter,
    store: AdapterStore,
) -> None:
    """Write the settings beside the adapter, as `unlearner forget --config` reads them.

    The store names no author, and rows in memory have no name.
    """
    import yaml

    named = request.kind == "tofu-split" or Path(request.name).exists()
    manifest = stored.manifest
    objective = {name: value for name, value in manifest.objective.items() if name != "name"}
    names = {f.name for kind in (LoraShape, TrainConfig) for f in fields(kind)}
    rest = {**manifest.lora, **manifest.train}
    settings = {
        "request": request.name if named else None,
        "base": base.spec.name,
        "revision": base.spec.revision,
        "dtype": base.spec.dtype,
        "load_in_4bit": base.spec.load_in_4bit,
        "device": base.spec.device,
        "attention": base.spec.attention,
        "template": options.template,
        "system": options.system,
        "objective": manifest.objective["name"],
        **objective,
        **{n: list(v) if isinstance(v, tuple) else v for n, v in rest.items() if n in names},
        "label": options.label or None,
        "neighbours": options.neighbours,
        "on_stack": bool(manifest.parents),
    }
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    store.keep_settings(stored.slug, f"# Settings of forget()\n{text}")


@contextmanager
def progress_bar(
    what: str, wanted: bool | Callable[[Mapping[str, Any]], None] | None
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What gets events with "step" and "steps": a bar where one is wanted, or `wanted` itself."""
    if callable(wanted):
        yield wanted
        return
    if not (_can_show() if wanted is None else wanted):
        yield lambda event: None
        return
    from tqdm.auto import tqdm

    bar = tqdm(desc=what, unit="step")

    def show(event: Mapping[str, Any]) -> None:
        if event.get("step") is None:
            return
        label = str(event.get("text") or what)
        if (bar.total, bar.desc.removesuffix(": ")) != (event.get("steps"), label):
            bar.reset(total=event.get("steps"))
            bar.set_description(label)
        losses = {k: f"{event[k]:.3g}" for k in ("forget_loss", "retain_loss") if event.get(k)}
        if losses:
            bar.set_postfix(losses, refresh=False)
        bar.update(event["step"] - bar.n)

    with bar:
        yield show


def _can_show() -> bool:
    """Whether this is a terminal or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


def html_table(facts: Iterable[tuple[str, Any]]) -> str:
    """Names and values as an HTML table, escaped."""
    from html import escape

    cells = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>"
        for name, value in facts
        if value is not None
    )
    return f"<table>{cells}</table>"
