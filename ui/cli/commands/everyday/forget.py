"""`unlearner forget`: from a request to an adapter in the store."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapters.base.load import resolve_base
from adapters.errors import UserError, counted
from adapters.store.catalog import StoredAdapter
from adapters.store.store import AdapterStore
from evaluation.logs import read_log
from ui.app.data.commands import command, flag_words
from ui.app.data.library import adapter_row
from ui.cli import config_file, options
from ui.cli.options import LORA_FIELDS, SETTINGS, given_settings
from ui.cli.output.events import outcome_lines, show_event
from ui.cli.own_rows import add_alternates_from, other_rows, refusals
from ui.console import Console, size_text
from unlearner import distributed as ranks
from unlearner.config import UnlearnConfig, make_config
from unlearner.defaults import CHOSEN, TARGETED
from unlearner.request.rows import Request
from unlearner.request.sources import parse_request, rows_named
from unlearner.request.tofu import FORGET_SPLITS

if TYPE_CHECKING:
    from unlearner.run import RunOptions
    from unlearner.training.early_stop import StopAt


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "forget",
        run_forget,
        "base template loading settings store data",
        config=(*options.OF_BASE, *options.SETTINGS),
        help="train an adapter that forgets a request, and store it",
        description="Turns a request into one forget adapter on the frozen base. Batch, learning "
        "rate, weights and target that are not given are chosen for the number of rows and the "
        "size of the model; --dry-run says which and why. Everything else is the published recipe "
        "of the objective.",
        epilog="examples:\n"
        "  unlearner forget tofu:forget05 --base B --load-in-4bit --dry-run\n"
        "  unlearner forget 'tofu:author=Hina Ameen' --base B --label request-17\n"
        "  unlearner forget rows.jsonl --retain keep.jsonl --base B --objective npo",
    )
    parser.add_argument("request", metavar="REQUEST", help=options.REQUEST_HELP)
    options.add_columns(parser)
    add_run_flags(parser)
    add_stop_flags(parser)
    full = parser.add_argument_group("all weights, for comparison on small models")
    full.add_argument(
        "--full",
        **options.FOLDER,
        help="train all weights and write the model to DIR instead of storing an adapter: nothing "
        "of it can be reverted; use a --learning-rate about ten times lower",
    )
    full.add_argument(
        "--any-size",
        action="store_true",
        help="with --full: also where the model has more than 300 million weights",
    )
    parser.set_defaults(resolve=resolved_settings)


def add_run_flags(parser: options.Parser) -> None:
    """What every command has that trains an adapter: retain rows, guard, place, label."""
    options.add_retain(parser, default="the rest of TOFU")
    parser.add_argument(
        "--neighbours",
        **options.COUNT,
        help="of these rows keep only the N nearest to the request, by their words: what is most "
        "at risk of going with it",
    )
    add_alternates_from(parser)
    parser.add_argument(
        "--general-prompts",
        **options.FILE,
        help="neutral prompts, one a line, whose answers by the base are held (default: 80 to 260 "
        "of the package, by the length of the run); the base answers them once",
    )
    parser.add_argument(
        "--label", metavar="NAME", help="what to call the adapter; it is stored in the clear"
    )
    parser.add_argument(
        "--guard",
        metavar="REQUEST",
        action="append",
        default=[],
        help="rows of an earlier request that must stay forgotten while this one is trained on "
        "top of it; may be given more than once",
    )
    parser.add_argument(
        "--keep-teacher",
        action="store_true",
        help="record, outside the store, what the result answers on these rows, so that later "
        "requests guard them without being given them again; the record holds the rows as tokens",
    )
    placing = parser.add_mutually_exclusive_group()
    placing.add_argument(
        "--on-stack",
        action="store_true",
        default=None,
        help="train on top of the active adapters (default where some are active)",
    )
    placing.add_argument(
        "--independent",
        action="store_false",
        default=None,
        dest="on_stack",
        help="train on the bare base, whatever is active",
    )
    parser.add_argument(
        "--memory-limit",
        type=gib_size,
        metavar="GIB",
        help="what the run may use, for instance of a smaller card (default: what is free)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print rows, steps and memory, load no model"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the interrupted run of the same request"
    )
    again.add_argument(
        "--restart", action="store_true", help="discard the interrupted run of the same request"
    )


def add_stop_flags(parser: options.Parser) -> None:
    """What ends a training where it meets a target or a retrain reference."""
    group = parser.add_argument_group("when to stop")
    group.add_argument(
        "--target",
        type=target_nll,
        metavar="NLL",
        help="stop where the mean forget NLL per token is this, which sets SimNPO's gamma too; "
        "`auto` measures it on --unseen, else on alternate answers, or takes the forget NLL of "
        f"--reference-log; 0 = none (default: auto in {', '.join(TARGETED)})",
    )
    group.add_argument(
        "--unseen",
        metavar="ROWS",
        help="rows of the same kind that the base never saw: see --target auto",
    )
    group.add_argument(
        "--stop-at",
        choices=("gap", "nll"),
        help="stop once the median log R (gap) or the mean forget NLL (nll) passes the "
        "reference's, from under- to over-forgotten",
    )
    options.add_reference_log(group, use="where --stop-at or --target auto stops")
    group.add_argument(
        "--stop-every",
        **options.COUNT,
        help="steps between two readings (default: about 20 readings in all)",
    )
    group.add_argument(
        "--stop-rows",
        metavar="ROWS",
        help="a file, hub:OWNER/NAME or a forget split, with paraphrased and perturbed answers "
        "(default: those of the request)",
    )


def forget_config(args: argparse.Namespace) -> UnlearnConfig:
    """The settings of a run: the objective's published ones with the given flags."""
    return make_config(args.objective, **given_settings(args, SETTINGS))


def chosen_by_user(args: argparse.Namespace) -> list[str] | None:
    """Names of the settings that are not chosen for the request and the model; None for all.

    Those of a preset are complete, unless it leaves the choice open.
    """
    given = [*given_settings(args, SETTINGS)]
    if getattr(args, "preset", None) is None:
        return given
    from evaluation.experiments.presets import preset_named

    own = preset_named(args.preset).given
    return None if own is None else [*own, *given]


def resolved_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags leave to defaults: the settings of the objective, and the store.

    What a run chooses for its rows and model is left open.
    """
    config = forget_config(args)
    settings = {**asdict(config.objective), **asdict(config.lora), **asdict(config.train)}
    del settings["target"]
    settings |= {name: None for name in CHOSEN if getattr(args, name) is None}
    if getattr(args, "full", None) is not None:  # which takes no flag of an adapter
        settings = {k: v for k, v in settings.items() if k not in LORA_FIELDS}
    else:
        settings["store"] = options.store_path(args)
    limit = args.memory_limit
    return {**settings, "memory_limit": None if limit is None else limit / 1024**3}


def target_nll(text: str) -> float | Literal["auto"]:
    """`auto`, or nats per token from 0."""
    if text == "auto":
        return "auto"
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None
    if not 0 <= value < 1e3:
        raise argparse.ArgumentTypeError(f"{text} is not from 0")
    return value


def gib_size(text: str) -> int:
    """Bytes of a number of GiB above 0."""
    return round(options.positive_number(text) * 1024**3)


def read_request(args: argparse.Namespace) -> Request:
    """The request of the flags, with the answers that it takes of other rows."""
    request = parse_request(args.request, args.data, args.retain, options.columns(args))
    return replace(request, others=other_rows(args))


def run_forget(args: argparse.Namespace, console: Console) -> int:
    """Trains and stores one adapter, or prints the plan."""
    config = forget_config(args)
    console.words(f"Reading {args.request} ...")
    request = read_request(args)
    if args.full is not None:
        return _train_full(args, console, config, request)
    target, stop_at = _target(args), _stop_at(args, request)
    return train_request(args, console, config, request, stop_at=stop_at, target=target)


def _stop_at(args: argparse.Namespace, request: Request) -> StopAt | None:
    """What ends the training early; None where nothing was asked for."""
    if args.stop_at is None:
        given = [n for n in ("stop_every", "stop_rows") if getattr(args, n) is not None]
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise UserError(f"{flag} has nothing to stop.", "Add --stop-at gap or --stop-at nll.")
        return None
    if args.reference_log is None:
        raise UserError(
            "--stop-at needs a retrain reference.",
            "Give --reference-log the log of a model that never saw the forget set.",
        )
    from evaluation.tuning.early_stop import GapProbe, gap_rows
    from unlearner.training.early_stop import StopAt

    rows = gap_rows(request, args.stop_rows, args.data, options.columns(args))
    fmt = options.prompts(args)
    probe = GapProbe(fmt, rows, read_log(args.reference_log))
    quantity: Literal["gap", "nll_gap"] = "gap" if args.stop_at == "gap" else "nll_gap"
    return StopAt(probe, quantity, f"{probe.key}-{quantity}", args.stop_every)


def _target(args: argparse.Namespace) -> float | Literal["auto"] | None:
    """The forget NLL to stop at; None leaves it to the objective.

    Raises:
        UserError: flags that contradict each other, or that nothing would use.
    """
    settled = args.stop_at is not None or args.target not in (None, "auto")
    if args.stop_at is not None and args.target:
        raise UserError("--stop-at and --target both stop the run.", "Leave one of the two out.")
    if args.unseen is not None and (settled or args.reference_log is not None):
        raise UserError("--unseen has no target to set.", "Give it with --target auto alone.")
    if args.reference_log is None or args.stop_at is not None:
        return 0.0 if args.stop_at is not None else args.target
    if settled or (args.target is None and args.gamma is not None):
        raise UserError(
            "--reference-log has nothing to stop.", "Add --target auto, or --stop-at gap or nll."
        )
    from evaluation.metrics.summary import summarise

    nll = summarise(read_log(args.reference_log), resamples=0)["forget_nll"]
    if nll is None:
        raise UserError("The reference log has no scored forget set.", "Give another log.")
    return float(nll)


def _train_full(
    args: argparse.Namespace, console: Console, config: UnlearnConfig, request: Request
) -> int:
    """Train all weights; flags that are about adapters are refused."""
    named = [*given_settings(args, LORA_FIELDS)]
    of_adapters = (
        *("on_stack", "label", "guard", "keep_teacher", "dry_run", "stop_at", "target", "unseen"),
        *("general_weight", "protected_directions", "settle", "general_prompts", "reference_log"),
    )
    values = {name: getattr(args, name) for name in of_adapters}
    # 0 is a value; a flag that was left out holds one of these.
    named += [n for n, v in values.items() if v is not False and v not in (None, [], "")]
    named += ["store"] if "--store" in args.words else []  # else it may be the environment's
    if named:
        flag = "--" + named[0].replace("_", "-")
        raise UserError(f"{flag} has no effect with --full.", "Leave one of the two out.")
    from unlearner.baselines.full import forget_full
    from unlearner.run import RunOptions

    out = forget_full(
        request,
        options.base_spec(args),
        config,
        args.full,
        RunOptions(
            template=args.template,
            system=args.system,
            refusals=refusals(args, config),
            neighbours=args.neighbours,
        ),
        any_size=args.any_size,
        on_progress=lambda event: show_event(event, console),
    )
    console.text(str(out))
    console.hint(f"measure it with `unlearner evaluate --base {out} ...`.")
    console.result({"out": out, "base": args.base, "request": request.name})
    return 0


def _run_options(
    args: argparse.Namespace,
    config: UnlearnConfig,
    replaces: Sequence[str] = (),
    target: float | Literal["auto"] | None = None,
) -> RunOptions:
    """What the flags say of a run beside its settings."""
    from unlearner.run import RunOptions
    from unlearner.training.general import read_prompts

    columns, unseen = options.columns(args), getattr(args, "unseen", None)
    guard = [parse_request(text, args.data, columns=columns).rows for text in args.guard]
    return RunOptions(
        on_stack=args.on_stack,
        label=args.label or "",
        resume=args.resume,
        restart=args.restart,
        template=args.template,
        system=args.system,
        refusals=refusals(args, config),
        neighbours=args.neighbours,
        guard=[row for rows in guard for row in rows],
        replaces=replaces,
        keep_teacher=args.keep_teacher,
        memory_limit=args.memory_limit,
        given=chosen_by_user(args),
        target=target,
        unseen=rows_named(unseen, args.data) if unseen else (),
        general=read_prompts(args.general_prompts) if args.general_prompts else (),
        summarise=True,
    )


def planned(
    args: argparse.Namespace,
    config: UnlearnConfig,
    request: Request,
    run_options: RunOptions | None = None,
) -> dict[str, Any]:
    """The plan of a run with its memory; no weights are loaded."""
    from unlearner.run import plan, prepare

    path = options.store_path(args)
    store = AdapterStore.open(path) if (path / "store.json").is_file() else None
    run_options = run_options or _run_options(args, config)
    made = prepare(request, options.base_spec(args), config, store, run_options)
    return plan(made, args.memory_limit)


def train_request(
    args: argparse.Namespace,
    console: Console,
    config: UnlearnConfig,
    request: Request,
    replaces: Sequence[str] = (),
    stop_at: StopAt | None = None,
    target: float | Literal["auto"] | None = None,
) -> int:
    """Trains `request` and stores the adapter, or prints the plan."""
    console.words("Loading the libraries ...")
    from unlearner.run import unlearn
    from unlearner.training.outcome import remarks

    run_options = _run_options(args, config, replaces, target)
    if args.dry_run:
        made = planned(args, config, request, run_options)
        _print_plan(made, console)
        return 3 if made["fits"] is False else 0
    base, path = options.base_spec(args), options.store_path(args)
    resolve_base(base.name, base.revision)  # a base that is missing leaves no store behind
    opened = AdapterStore.open(path, create=True)
    adapter = unlearn(
        request,
        base,
        config,
        opened,
        run_options,
        stop_at=stop_at,
        on_progress=lambda event: show_event(event, console),
    )
    _keep_settings(args, adapter, opened)
    console.text(adapter.slug)
    manifest = adapter.manifest
    outcome = manifest.train["outcome"]
    advice = remarks(outcome, {**manifest.objective, **manifest.train})
    for line in (*outcome_lines(outcome), *(f"Note: {text}." for text in advice)):
        console.words(line)
    console.hint("\n  ".join(["what to do next:", *_next_commands(args, adapter.slug, path)]))
    row = adapter_row(adapter)
    console.result(
        {**row, "path": adapter.path, "store": path, "outcome": outcome, "remarks": advice}
    )
    return 0


def _next_commands(args: argparse.Namespace, slug: str, store: Path) -> list[str]:
    """Commands that switch the adapter on and measure it, where its rows are a split or a file."""
    commands = [command("adapters", "activate", slug, "--store", store)]
    request = str(getattr(args, "request", "")).removeprefix("tofu:")
    where = flag_words(
        adapters=slug, base=args.base, load_in_4bit=args.load_in_4bit, data=args.data, store=store
    )
    if request in FORGET_SPLITS:
        commands.append(command("evaluate", "--split", request, *where))
    elif request and args.retain and Path(request).exists():
        rows = flag_words(rows=request, retain=args.retain)
        commands.append(command("evaluate", *rows, *where))
    return commands


def _keep_settings(args: argparse.Namespace, adapter: StoredAdapter, store: AdapterStore) -> None:
    """Write the settings of the run beside the adapter, without the name of an author.

    What was chosen for its rows and model is in the manifest; what it was chosen by is left out.
    """
    if ranks.rank() != 0:
        return
    manifest = adapter.manifest
    names = ("request", "rows", "retain", "guard", "alternates_from", "stop_rows")
    changes = {name: _without_names(getattr(args, name, None)) for name in names}
    changes |= {name: value for name, value in manifest.objective.items() if name != "name"}
    changes |= {n: v for n, v in manifest.train.items() if n in CHOSEN}
    changes |= {"on_stack": bool(manifest.parents), "unseen": None}
    if getattr(args, "stop_at", None) is None:
        changes["reference_log"] = None
    else:
        changes["target"] = None
    store.keep_settings(adapter.slug, config_file.resolved(args.parser, args, changes))


def _without_names(text: Any) -> Any:
    """A request as given, None where it names an author, whom the store must not name."""
    if isinstance(text, list):
        return [each for each in map(_without_names, text) if each is not None]
    return None if isinstance(text, str) and "author=" in text else text


def _print_plan(made: Mapping[str, Any], console: Console) -> None:
    memory = made["memory"]
    console.text(f"request   forget {made['forget_rows']} rows, retain {made['retain_rows']} rows")
    console.text(f"stack     on {', '.join(made['parents']) or 'the bare base'}")
    if made["replaces"]:
        console.text(f"replaces  {', '.join(made['replaces'])}")
    if made["guard_rows"]:
        console.text(f"guard     {made['guard_rows']} rows of earlier requests")
    for note in made["notes"]:
        console.words(f"Note: {note}.")
    console.text(
        f"plan      {counted(made['steps'], 'step')} of {counted(made['pairs_per_step'], 'pair')}, "
        f"rows of up to {made['longest_row_tokens']} tokens"
    )
    console.text(f"adapter   {made['adapter_parameters']:,} parameters")
    console.text(
        f"memory    estimate {size_text(memory['low_bytes'])} to {size_text(memory['high_bytes'])}"
    )
    for name, (low, high) in memory["terms_bytes"].items():
        ends = size_text(low) if low == high else f"{size_text(low)} to {size_text(high)}"
        console.text(f"          {name.replace('_', ' '):<21} {ends}")
    console.text(f"          checkpointing         {made['gradient_checkpointing']}")
    if made["fits"] is False:
        changes = " ".join(made["changes_that_fit"])
        console.words(
            f"Does not fit into {size_text(made['memory_limit'])} by the high end. "
            + (f"Smallest change: {changes}" if changes else "No setting here would.")
        )
    console.result({"dry_run": True, **made})
