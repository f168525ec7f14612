"""The models that commands measure: the base that the flags name, and adapters on it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters.base.fingerprint import BaseFingerprint, fingerprint_base
from adapters.base.load import base_view, load_base, resolve_base
from adapters.errors import Interrupted
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.logs.records import EvalLog
from ui.app.data.commands import command
from ui.cli import options, own_rows
from ui.cli.output.events import progress_of
from ui.cli.output.scoring import PARTS, effort_of
from ui.console import Console
from unlearner.tokens.prompts import PromptFormat

if TYPE_CHECKING:
    from evaluation.suite import EvalData
    from ui.cli.commands.everyday.evaluate_metrics import Extras

Stack = list[tuple[str, float]]


class LoadedBase(NamedTuple):
    """The base of --base with its prompts, and how it is held in memory (see `base_view`)."""

    model: Any
    fmt: PromptFormat
    fingerprint: BaseFingerprint
    view: Mapping[str, Any]


def load(args: argparse.Namespace) -> LoadedBase:
    """The base that the flags name."""
    fmt = options.prompts(args)
    fingerprint = fingerprint_base(resolve_base(args.base, args.revision))
    model = load_base(options.base_spec(args))
    return LoadedBase(model, fmt, fingerprint, base_view(model))


def chosen_stack(args: argparse.Namespace, store: AdapterStore) -> Stack:
    """The adapters of --adapters by their --scales, by default the store's active ones as they are.

    Raises:
        UserError: --scales without --adapters, or not one for each.
    """
    scales = options.scales_by_ref(args, args.adapters)
    if args.adapters is None:
        return [(active.slug, active.scale) for active in store.active()]
    return [(store.get(ref).slug, scales.get(ref, 1.0)) for ref in args.adapters]


def measure(
    args: argparse.Namespace,
    base: LoadedBase,
    model: Any,
    stack: Stack,
    data: EvalData,
    retain_log: EvalLog | None,
    out: Path | None,
    console: Console,
    extras: Extras | None = None,
) -> EvalLog:
    """The log of `model`, which is `base` with `stack` active; parts are cached in `out`."""
    from evaluation.suite import evaluate

    key, show = key_of(base=base.fingerprint.digest, adapters=stack), progress_of(console)
    about = {"split": own_rows.name_of(args), "command": command(*args.words)}
    meta = {**about, "adapters": stack, **base.view}
    log = evaluate(
        model,
        base.fmt,
        data,
        protocol=args.protocol,
        retain_log=retain_log,
        limit=args.limit,
        key=key,
        resume_dir=out / PARTS if out else None,
        on_progress=show,
        effort=effort_of(args),
        meta=meta,
    )
    if extras is not None:
        extras.measure(model, base.fmt, key, meta, show)
    return log


@contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """Inside, an interruption says that finished parts are kept in `folder` (None keeps none)."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted):
        if folder is None:
            raise
        raise Interrupted(
            f"Interrupted: the finished parts are kept in {folder}.",
            "Run the same command again to continue.",
        ) from None
