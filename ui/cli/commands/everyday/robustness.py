"""`unlearner robustness`: what the forgetting of a stack or of merged weights stands up to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from adapters.store.store import AdapterStore
from evaluation.logs import read_log
from evaluation.logs.records import write_json
from evaluation.report.cards import VERDICT_WORDS
from ui.cli import models, options
from ui.cli.options import COUNT, NAMES, NUMBER
from ui.cli.output.events import progress_of
from ui.cli.output.scoring import check_gates, effort_of, parse_gate
from ui.console import Console, json_value
from unlearner import distributed as ranks

if TYPE_CHECKING:
    from evaluation.robustness.card import Settings
    from evaluation.robustness.quantisation import Subject

STATE_COLUMNS = (
    "name", "forget_quality", "ks", "log_r_shift", "direction", "model_utility",
    "forget_answer_prob", "forget_nll", "retain_answer_prob",
)  # fmt: skip
ASKED_COLUMNS = (
    "form", "base_answer_prob", "answer_prob", "retrain_answer_prob", "base_fact_recall",
    "fact_recall", "retrain_fact_recall", "n",
)  # fmt: skip


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "robustness",
        run_robustness,
        "base template loading store data",
        config=("base", "template", "protocol"),
        help="attack the forgetting: quantise, relearn, sample, rephrase, probe, switch off",
        description="One card per adapter, stack or merged model: its figures in every form it may "
        "be run in, and what attacks bring back, each with a verdict and its threshold. With --out "
        "every finished part is kept: the same command continues after an interruption.",
        epilog="examples:\n  unlearner robustness --base B --store S --split forget05 "
        "--reference-log retrain.json --retrain RETRAIN --out card\n"
        "  unlearner robustness --base B --merged released --split forget05 --out card "
        "--attacks states,relearn --relearn-steps 40",
    )
    _add_what(parser)
    _add_attacks(parser)


def _add_what(parser: options.Parser) -> None:
    what = parser.add_mutually_exclusive_group()
    options.add_adapters(what, "attack these adapters in this order")
    what.add_argument("--merged", **options.FOLDER, help="attack the merged weights in this folder")
    options.add_scales(parser)
    options.add_split(parser, required=True)
    options.add_reference_log(parser)
    parser.add_argument(
        "--retrain",
        metavar="B",
        help="such a model itself, attacked in the same way as a control",
    )
    options.add_protocol(parser)
    options.add_out(parser, "folder of the card and its parts")
    options.add_limit(parser)
    options.add_questions_per_batch(parser)
    options.add_fail_if(parser, "relearned_answer_prob>0.1")


def _add_attacks(parser: options.Parser) -> None:
    group = parser.add_argument_group("attacks")
    group.add_argument(
        "--attacks",
        **NAMES,
        help="which: states, relearn, sample, paraphrase, probe, drop (default: all)",
    )
    group.add_argument(
        "--states",
        **NAMES,
        help="which forms are measured: origin, adapter, adapter-nf4, merged, merged-nf4, "
        "merged-int8 (default: all there are)",
    )
    group.add_argument("--relearn-share", **NUMBER, help="of the forget rows is trained on (0.1)")
    group.add_argument("--relearn-steps", **COUNT, help="of AdamW, each on all these rows (20)")
    group.add_argument(
        "--relearn-lr",
        **NUMBER,
        help="constant learning rate (default by size: all weights 3e-4 below 20 million, 5e-5 "
        "below a billion, 1e-5 above; an adapter 3e-3, 5e-4, 2e-4)",
    )
    group.add_argument(
        "--relearn-with",
        choices=("auto", "full", "lora"),
        help="train all weights or a new adapter (default: auto: all up to a billion)",
    )
    group.add_argument("--samples", **COUNT, help="answers a question (64)")
    group.add_argument("--temperature", **NUMBER, help="of the draws (1)")
    group.add_argument("--top-p", **NUMBER, help="of the draws (1)")
    group.add_argument("--sample-rows", **COUNT, help="forget rows that are sampled (40)")
    group.add_argument("--paraphrase-rows", **COUNT, help="forget rows asked in each form (100)")
    group.add_argument(
        "--wordings",
        **options.FILE,
        help="ask in these words too, such as translations: JSON lines of question, asked and "
        "wording (its name)",
    )
    group.add_argument("--probe-rows", **COUNT, help="forget and retained rows of the probe (100)")
    group.add_argument(
        "--seed", type=options.seed, metavar="N", help="of rows, draws, first weights (0)"
    )


def run_robustness(args: argparse.Namespace, console: Console) -> int:
    """Prints the card; 0 whatever the verdicts, 4 where a gate fails."""
    if args.load_in_4bit:
        raise UserError("The card measures nf4 beside full precision.", "Leave out --load-in-4bit.")
    if ranks.world_size() > 1:
        raise UserError("The attacks run in one process.", "Start the command without a launcher.")
    named = "the active adapters" if args.adapters is None else ", ".join(args.adapters)
    what = args.merged or f"{named} on {args.base}"
    console.words(f"Attacking {what} on {args.split} ...")
    from evaluation.robustness.card import CARD_FILE, Examination
    from evaluation.robustness.quantisation import STATES
    from evaluation.robustness.verdicts import figure_names, flat_figures
    from evaluation.robustness.wordings import read_wordings
    from evaluation.suite import load_eval_data

    names = figure_names(STATES)
    gates = [parse_gate(text, names) for text in args.fail_if]
    settings, subject = _settings(args), _subject(args)
    wordings = read_wordings(args.wordings) if args.wordings else ()
    data = load_eval_data(args.split, args.data)
    retain_log = read_log(args.reference_log) if args.reference_log else None
    with models.resumable(args.out and args.out / "parts"):
        card = Examination(
            subject,
            data,
            settings,
            args.split,
            protocol=args.protocol,
            retain_log=retain_log,
            limit=args.limit,
            wordings=wordings,
            out=args.out,
            on_progress=progress_of(console),
            effort=effort_of(args),
        ).card()
    figures = flat_figures(card)
    if args.out:
        path = write_json(args.out / CARD_FILE, json_value(card))
        console.words(f"Wrote {path}")
    _attach(subject, args, card, figures)
    report_card(card, console)
    check_gates(gates, figures)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    """The attacks' settings, with their own defaults where a flag was not given."""
    from dataclasses import fields

    from evaluation.robustness.card import Settings

    given = options.given_settings(args, [field.name for field in fields(Settings)])
    lists: dict[str, Any] = {k: tuple(v) for k, v in given.items() if isinstance(v, list)}
    return Settings(**{**given, **lists})


def _subject(args: argparse.Namespace) -> Subject:
    """What the flags name; refused where there is nothing to attack."""
    from evaluation.robustness.quantisation import Subject

    store: AdapterStore | None = None
    stack: tuple[tuple[str, float], ...] = ()
    if args.merged is None:
        store = options.open_store(args)
        stack = tuple(models.chosen_stack(args, store))
    return Subject(
        options.base_spec(args),
        store,
        stack,
        args.merged,
        args.retrain,
        args.template,
        args.system,
        allow_missing_parents=args.adapters is None,
    )


def _attach(
    subject: Subject, args: argparse.Namespace, card: Mapping[str, Any], figures: dict[str, Any]
) -> None:
    """Files the figures and verdicts with the last adapter: numbers and words, never a text."""
    if subject.store is None or not subject.stack:
        return
    slugs = [slug for slug, _ in subject.stack]
    # Only a measured stack counts as evaluated again; a card of other attacks leaves it stale.
    measured = any(state["name"] == "adapter" for state in card["states"])
    about = {
        "stack" if measured else "attacked": slugs,
        "scales": dict(subject.stack),
        "split": args.split,
        "protocol": card["protocol"],
        "limit": args.limit,
        "verdicts": {
            verdict["name"]: VERDICT_WORDS[verdict["holds"]] for verdict in card["verdicts"]
        },
    }
    subject.store.attach_eval(slugs[-1], f"robustness-{args.split}", {**figures, **about})


def report_card(card: Mapping[str, Any], console: Console) -> None:
    """Prints the card as tables and verdict lines, or as one JSON object."""
    if card["states"]:
        rows = [{c: state[c] for c in STATE_COLUMNS} for state in card["states"]]
        console.table(rows, STATE_COLUMNS)
        limit = card["limit"]
        part = "" if limit is None else f", only the first {limit} rows of each set"
        console.text(f"protocol {card['protocol']}, split {card['split']}{part}")
        console.text()
    if card["relearning"]:
        found = card["relearning"]
        console.text(
            f"relearning {found['rows_seen']} rows ({found['with']}, learning rate "
            f"{found['learning_rate']:g}): answer probability of these rows and of "
            f"{found['rows_unseen']} others"
        )
        console.table(relearning_rows(found))
        console.text()
    if card["sampling"]:
        found = card["sampling"]
        console.text(
            f"best of n answers, {found['rows']} questions, temperature {found['temperature']:g}"
        )
        console.table(sampling_rows(found))
        console.text()
    if card["paraphrase"]:
        names = [name for name in ASKED_COLUMNS if name in card["paraphrase"][0]]
        console.table(card["paraphrase"], names)
        console.text()
    if card["probe"]:
        console.text("linear probe: share of wrong answers ranked below the true one, by layer")
        console.table(probe_rows(card["probe"]))
        console.text()
    for verdict in card["verdicts"]:
        value = "-" if verdict["value"] is None else f"{verdict['value']:.3g}"
        console.text(
            f"{VERDICT_WORDS[verdict['holds']]:<9}  {verdict['name']:<19}  {value} against "
            f"{verdict['threshold']:.3g}: {verdict['text']}"
        )
    console.text(f"{card['seconds']:.0f} s in all")
    console.result(card)


def relearning_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each step, two columns for each model; Origin is not attacked and has none."""
    by_step: dict[int, dict[str, Any]] = {}
    for curve in found["curves"]:
        if curve["name"] == "origin":
            continue
        for point in curve["points"]:
            row = by_step.setdefault(point["step"], {"step": point["step"]})
            row[f"{curve['name']}_seen"] = point["seen_answer_prob"]
            row[f"{curve['name']}_unseen"] = point["unseen_answer_prob"]
    return [by_step[step] for step in sorted(by_step)]


def sampling_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each n, two columns for each model."""
    rows: list[dict[str, Any]] = [{"n": point["n"]} for point in found["curves"][0]["points"]]
    for curve in found["curves"]:
        for row, point in zip(rows, curve["points"], strict=True):
            row[f"{curve['name']}_rouge_l"] = point["best_rouge_l_recall"]
            row[f"{curve['name']}_leaked"] = point["share_leaked"]
    return rows


def probe_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each layer, a column for each model."""
    curves = {curve["name"]: curve["points"] for curve in found["curves"]}
    return [
        {"layer": i, **{name: points[i]["forgotten"] for name, points in curves.items()}}
        for i in range(len(found["curves"][0]["points"]))
    ]
