"""`unlearner calibrate`: how strong an adapter should be, and the adapter at that strength."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.environment import versions
from adapters.errors import UserError
from adapters.lora.stack import MAX_SCALE, load_stack
from adapters.store.catalog import StoredAdapter
from adapters.store.derive import scaled
from adapters.store.store import AdapterStore
from evaluation.cache import key_of
from evaluation.logs import read_log
from evaluation.logs.records import write_json, write_log
from evaluation.report.inputs import LOG_FILE
from ui.cli import models, options
from ui.cli.output.events import progress_of
from ui.cli.output.scoring import PARTS
from ui.console import Console, json_value
from unlearner import distributed as ranks

if TYPE_CHECKING:
    from evaluation.tuning.calibrate import Settings
    from evaluation.tuning.sweep import Sweep

FILE = "calibration.json"
COLUMNS = (
    "scale", "log_r_gap", "ks", "forget_quality", "forget_nll", "forget_answer_prob",
    "retain_answer_prob", "model_utility", "note",
)  # fmt: skip


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "calibrate",
        run_calibrate,
        "base template loading store data",
        config=(*options.OF_BASE, "protocol"),
        help="choose an adapter's strength against a retrain reference, and publish it so",
        description="Sweeps the strength of one adapter, the rest of its stack held fixed, chooses "
        "the scale nearest to the retrain reference within a bound on the loss of model utility, "
        "and publishes the adapter at that scale as a new one. With --out every finished part is "
        "kept: the same command continues after an interruption.",
        epilog="example:\n  unlearner calibrate r0001 --base B --store S --split forget05 "
        "--reference-log retrain.json --out results",
    )
    parser.add_argument("ref", metavar="REF", help=f"adapter: {options.REF}")
    what = parser.add_mutually_exclusive_group(required=True)
    options.add_split(what)
    what.add_argument(
        "--rows",
        metavar="ROWS",
        help="forget rows with paraphrased_answer and perturbed_answer, instead of a split: a file "
        "or hub:OWNER/NAME",
    )
    options.add_columns(parser)
    options.add_reference_log(parser, use="required for calibration")
    parser.add_argument(
        "--scales",
        type=scale_list,
        metavar="X,Y",
        help="first grid, 0 to 1.5; 0 and 1 always belong to it (default: 0,0.1,...,1.5)",
    )
    parser.add_argument(
        "--by",
        choices=("gap", "ks"),
        default="gap",
        help="minimise the shift of the median log R, or the KS statistic D (default: gap)",
    )
    parser.add_argument(
        "--max-mu-loss",
        type=float,
        metavar="X",
        help="the most that model utility may lose against scale 0 (default: 0.05)",
    )
    options.add_protocol(parser)
    options.add_out(parser, f"folder for {FILE} and the logs")
    options.add_limit(
        parser,
        "measure only the first N rows of each set, and publish nothing unless --publish is given",
    )
    parser.add_argument(
        "--publish",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="store the adapter at the chosen scale as a new one (default: yes)",
    )


def scale_list(text: str) -> tuple[float, ...]:
    """Scales divided by commas, each 0 to 1.5."""
    values = options.number_list(text)
    if not all(0 <= value <= MAX_SCALE for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not within 0 to {MAX_SCALE}")
    return values


def run_calibrate(args: argparse.Namespace, console: Console) -> int:
    """Prints the curve and the choice, attaches it to the adapter, publishes the scaled one."""
    settings = _settings(args)
    console.words(f"Calibrating {args.ref} on {args.split or args.rows} ...")
    from evaluation.tuning.calibrate import calibrate

    store = options.open_store(args)
    sweep = _sweep(args, store, console)

    def measure(scale: float) -> Any:
        log = sweep.measure(scale)
        if args.out and ranks.rank() == 0:
            write_log(log, args.out / f"scale-{scale:g}" / LOG_FILE)
        return log

    with models.resumable(args.out and args.out / PARTS):
        found = calibrate(sweep.look, measure, sweep.retain_log, settings)
    _finish(args, store, sweep, found, console)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """Grid, rule and bound; everything that can be refused before a model is loaded."""
    from evaluation.tuning.calibrate import Settings

    if args.reference_log is None:
        raise UserError(
            "Calibration needs a retrain reference: without one nothing says how much is enough.",
            "Give --reference-log the log of a model that never saw the forget set.",
        )
    given = options.given_settings(args, ("by", "max_mu_loss", "protocol", "scales"))
    settings = Settings(**given)
    if not 0 <= settings.max_mu_loss <= 1:
        raise UserError(
            f"--max-mu-loss {settings.max_mu_loss:g} is not between 0 and 1.", "Use 0.05, say."
        )
    return settings


def _sweep(args: argparse.Namespace, store: AdapterStore, console: Console) -> Sweep:
    """The loaded model with the adapter's stack attached."""
    from evaluation.tuning.sweep import Sweep, calibration_data, stack_of

    slug, stack = stack_of(store, args.ref)
    retain_log = read_log(args.reference_log)
    data = calibration_data(args.split, args.rows, args.data, options.columns(args))
    base = models.load(args)
    fingerprint, fmt = base.fingerprint, base.fmt
    files = [store.get(each).manifest.files for each in stack]
    identity = key_of(base=fingerprint.digest, view=base.view, template=fmt.name, adapters=files)
    return Sweep(
        model=load_stack(base.model, store, list(stack), stack, base=fingerprint),
        fmt=fmt,
        data=data,
        retain_log=retain_log,
        slug=slug,
        stack=stack,
        identity=identity,
        protocol=args.protocol,
        limit=args.limit,
        resume_dir=args.out / PARTS if args.out else None,
        on_progress=progress_of(console),
    )


def _finish(
    args: argparse.Namespace,
    store: AdapterStore,
    sweep: Sweep,
    found: dict[str, Any],
    console: Console,
) -> None:
    """Publishes, writes, attaches and prints what was found."""
    from evaluation.tuning.sweep import flat

    made = ranks.from_first(lambda: _publish(args, store, sweep, found))
    told = {
        "base": args.base,
        "adapter": sweep.slug,
        "stack": [list(pair) for pair in sweep.stack.items()],
        "split": args.split or "rows",
        "limit": args.limit,
        "retain_log": str(args.reference_log),
        "probe_retain_rows": len(sweep.probe_retain),
        **found,
        "published": made.slug if made else None,
        "versions": versions(),
    }
    if ranks.rank() == 0:
        if args.out:
            write_json(args.out / FILE, json_value(told))
            console.words(f"Wrote {args.out / FILE}")
        store.attach_eval(sweep.slug, f"calibration-{told['split']}", json_value(flat(told)))
    _print(told, console)


def _publish(
    args: argparse.Namespace, store: AdapterStore, sweep: Sweep, found: Mapping[str, Any]
) -> StoredAdapter | None:
    """The scaled adapter with the figures it was chosen by, where there is one to publish."""
    from evaluation.metrics.summary import figures_to_file

    scale = found["chosen_scale"]
    wanted = args.limit is None if args.publish is None else args.publish
    if scale in (None, 1.0) or not wanted:
        return None
    made = scaled(store, sweep.slug, scale)
    figures = next(one for one in found["evaluations"] if one["scale"] == scale)
    scales = {
        made.slug if slug == sweep.slug else slug: 1.0 if slug == sweep.slug else scale
        for slug, scale in sweep.stack.items()
    }
    name, result = figures_to_file(figures, args.split or "rows", scales, args.limit)
    held = (found["held_out"] or {}).get("forget_quality")
    about = {"held_out_forget_quality": held, "scales_tried": found["tried"]}
    store.attach_eval(made.slug, name, {**result, **about})
    return made


def _print(found: Mapping[str, Any], console: Console) -> None:
    chosen = found["chosen_scale"]
    notes = {found["best_by_ks"]: "best by ks", found["best_by_gap"]: "best by gap", 1.0: "trained"}
    if chosen is not None:
        notes[chosen] = "chosen"
    rows = [{**point, "note": notes.get(point["scale"], "")} for point in found["curve"]]
    console.table(rows, list(COLUMNS))
    console.text(f"rule            {found['rule']}")
    console.text(f"protocol        {found['protocol']}, {found['tried']} scales tried")
    console.text(f"retrain NLL     {rows[0]['retrain_forget_nll']:.3f} nats per token")
    console.text(_choice_text(found))
    if held := found["held_out"]:
        odd, even = held["chosen_on_odd_rows"], held["chosen_on_even_rows"]
        console.text(
            f"held out        forget_quality {held['forget_quality']:.4g}, D {held['ks']:.4f}: "
            f"every row at the\n                scale chosen without it ({odd['scale']:g} on odd "
            f"rows, {even['scale']:g} on even ones)"
        )
    if found["published"]:
        console.hint(f"switch it on with `unlearner adapters activate {found['published']}`.")
    console.result(found)


def _choice_text(found: Mapping[str, Any]) -> str:
    chosen = found["chosen_scale"]
    if chosen is None:
        return f"chosen          none: {found['reason']}"
    at = {one["scale"]: one for one in found["evaluations"]}
    low, high = at[chosen]["model_utility_interval"]
    utility = at[chosen]["model_utility"]
    return (
        f"chosen          scale {chosen:g}: model_utility {utility:.4f} [{low:.4f}, {high:.4f}], "
        f"{utility - at[0.0]['model_utility']:+.4f} against scale 0; "
        + (f"published as {found['published']}" if found["published"] else "not published")
        + (f" ({found['reason']})" if found["reason"] else "")
    )
