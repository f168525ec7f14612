"""The forms in which an unlearned model may be run, each loaded as its user would load it.

Adapters are merged into the base's original weights, never into quantised ones; the merged weights
are quantised when they are loaded. They are in a folder that is deleted at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapters.atomic_files import is_stale_temp, temporary_name
from adapters.base.fingerprint import BaseFingerprint, fingerprint_base
from adapters.base.load import BaseSpec, load_base, load_tokenizer, resolve_base
from adapters.base.weights import weight_files
from adapters.environment import free_memory, threads_for
from adapters.errors import UserError
from adapters.lora.merge import fold_stack
from adapters.lora.stack import load_stack
from adapters.store.store import AdapterStore
from adapters.tensors import read_header
from unlearner.tokens.prompts import PromptFormat, Template, prompt_format

STATES = ("origin", "adapter", "adapter-nf4", "merged", "merged-nf4", "merged-int8")
QUANTISED = {"adapter-nf4": "adapter", "merged-nf4": "merged", "merged-int8": "merged"}


class Loaded(NamedTuple):
    """A model in evaluation mode, with its prompts and tokenizer."""

    model: Any
    fmt: PromptFormat


@dataclass(frozen=True)
class Subject:
    """What is attacked: adapters of a store on their base, or merged weights.

    Attributes:
        base: the original model, and how all forms are loaded.
        store, stack: adapters in order with their scales; empty where `merged` is given.
        merged: folder of merged weights.
        retrain: a model that never saw the forget set: the control of the attacks that need one.
        template, system: see `prompt_format`.
        allow_missing_parents: of a stack that is active as it is, see `load_stack`.
    """

    base: BaseSpec
    store: AdapterStore | None = None
    stack: tuple[tuple[str, float], ...] = ()
    merged: Path | None = None
    retrain: str | None = None
    template: Template = "auto"
    system: str | None = None
    allow_missing_parents: bool = False

    def __post_init__(self) -> None:
        if (self.merged is None) == (not self.stack):
            raise UserError(
                "There is nothing to attack: give adapters of the store, or merged weights.",
                "Name adapters of the store with --adapters, or merged weights with --merged.",
            )

    @property
    def states(self) -> tuple[str, ...]:
        """The forms it has; merged weights have no adapter."""
        return STATES if self.stack else ("origin", *(s for s in STATES if s.startswith("merged")))

    @property
    def unlearned(self) -> str:
        """The form in full precision that the questions are asked of."""
        return "adapter" if self.stack else "merged"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digests of everything that decides the weights, as JSON."""
        device = "cuda" if torch.cuda.is_available() and self.base.device != "cpu" else "cpu"
        inputs: dict[str, Any] = {
            "base": fingerprint_base(resolve_base(self.base.name, self.base.revision)).digest,
            "loading": [self.base.dtype, self.base.attention, device],
            "template": self.template if self.system is None else [self.template, self.system],
        }
        if self.store is not None:
            files = [self.store.get(slug).manifest.files for slug, _ in self.stack]
            inputs["stack"] = [[*pair, each] for pair, each in zip(self.stack, files, strict=True)]
        if self.merged is not None:
            inputs["merged"] = fingerprint_base(self.merged).digest
        return inputs

    @cached_property
    def retrain_identity(self) -> str | None:
        """Digest of the control's weights."""
        return self.retrain and fingerprint_base(resolve_base(self.retrain)).digest


class Workplace:
    """Loads the forms of a subject one at a time; merges its adapters once, when first needed."""

    def __init__(self, subject: Subject, scratch: Path | None = None) -> None:
        """Takes the subject, and a folder for the merged weights (by default beside the store).

        They are as large as the base, so the system's temporary folder, which is often a part of
        the memory, is no place for them.
        """
        self.subject = subject
        self._scratch = scratch or (subject.store.path.parent if subject.store else Path.cwd())
        self._folded: Path | None = None

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folded is not None:
            shutil.rmtree(self._folded, ignore_errors=True)

    @contextmanager
    def loaded(self, state: str, *, float32: bool = False) -> Iterator[Loaded]:
        """The model of that form (`retrain` is the control), in one thread where it is small.

        Args:
            state: one of `STATES`, or "retrain".
            float32: load in float32 in any case, to train all weights.
        """
        subject, spec = self.subject, self._spec(state)
        tokenizer = load_tokenizer(spec.name, spec.revision)
        fmt = prompt_format(tokenizer, subject.template, subject.system)
        spec = replace(spec, dtype="float32") if float32 else spec
        free_memory()  # of the form before
        model: Any = load_base(spec, int8=state.endswith("int8"))
        if state.startswith("adapter") and subject.store is not None:
            scales = dict(subject.stack)
            model = load_stack(
                model, subject.store, list(scales), scales, base=self._fingerprint,
                allow_missing_parents=subject.allow_missing_parents,
            )  # fmt: skip
        with threads_for(model):
            yield Loaded(model, fmt)

    @contextmanager
    def when_needed(self, state: str) -> Iterator[Callable[[], Loaded]]:
        """A function that loads the model of that form at its first call."""
        with ExitStack() as stack:
            yield cache(lambda: stack.enter_context(self.loaded(state)))

    def weights(self, state: str) -> int:
        """How many weights the form's files hold."""
        spec = self._spec(state)
        headers = map(read_header, weight_files(resolve_base(spec.name, spec.revision)))
        return sum(prod(info.shape) for header in headers for info in header.tensors.values())

    def _spec(self, state: str) -> BaseSpec:
        """The folder of the form, and whether it is loaded in 4 bit."""
        spec = replace(self.subject.base, load_in_4bit=state.endswith("nf4"))
        if state == "retrain":
            return replace(spec, name=str(self.subject.retrain), revision=None)
        if state.startswith("merged"):
            return replace(spec, name=str(self.merged_folder), revision=None)
        return spec

    @property
    def _base_folder(self) -> Path:
        return resolve_base(self.subject.base.name, self.subject.base.revision)

    @property
    def _fingerprint(self) -> BaseFingerprint:
        return fingerprint_base(self._base_folder)

    @cached_property
    def merged_folder(self) -> Path:
        """The merged weights: the subject's own, else its adapters folded into the base now."""
        if self.subject.merged is not None:
            return self.subject.merged
        store = self.subject.store
        assert store is not None  # a subject without merged weights has a stack
        base = self._fingerprint
        stack = [(store.require_whole(slug, base).path, s) for slug, s in self.subject.stack]
        self._scratch.mkdir(parents=True, exist_ok=True)
        # A killed process leaves its weights behind: many gigabytes of a large model.
        for path in self._scratch.glob(".tmp-*-merged"):
            if is_stale_temp(path):
                shutil.rmtree(path, ignore_errors=True)
        self._folded = self._scratch / temporary_name("merged")
        return fold_stack(self._base_folder, stack, self._folded).path
