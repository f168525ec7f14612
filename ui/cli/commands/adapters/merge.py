"""`unlearner merge`: fold adapters into full weights, the only form that can be released."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from adapters.base.fingerprint import fingerprint_base
from adapters.base.load import BaseSpec, resolve_base
from adapters.errors import UserError
from adapters.lora.merge import fold_stack, require_full_weights
from adapters.lora.model_card import Release, write_release
from adapters.store.catalog import StoredAdapter
from adapters.store.states import after
from adapters.store.store import AdapterStore
from evaluation.logs import read_log
from ui.cli import models, options
from ui.cli.output.events import progress_of
from ui.console import Console
from unlearner.objectives.registry import OBJECTIVES, OPTION_FORMULAS


def register(commands: Any) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands,
        "merge",
        run_merge,
        "base template store data",
        config=("base", "template", "protocol"),
        help="fold adapters into full weights, which can be released",
        description="Adds the adapters to the base's original weights in float32, rounds once and "
        "writes a model that loads anywhere. Shard by shard: the model is never whole in memory.",
        epilog="examples:\n  unlearner merge --store S --base B --out merged\n"
        "  unlearner merge --store S --base B --out released --split forget05 "
        "--reference-log retrain.json --candidates 12",
    )
    options.add_out(parser, "a new folder", required=True)
    options.add_adapters(parser, "merge these adapters")
    options.add_scales(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the written weights (default: auto, that of the base)",
    )
    parser.add_argument(
        "--from-4bit-view",
        action="store_true",
        help="fold into the base as nf4 shows it, the one a QLoRA adapter was trained on "
        "(default: its original weights, which keep more of its quality)",
    )
    parser.add_argument("--load-in-4bit", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("figures of the model card")
    options.add_split(
        group,
        text="measure the base and the written weights on this forget split: forget01, forget05 or "
        "forget10 (default: the model card states that nothing was measured)",
    )
    options.add_reference_log(group)
    options.add_protocol(group)
    options.add_limit(group)
    group.add_argument(
        "--candidates",
        **options.COUNT,
        help="how many adapters or settings these were selected from, for the card",
    )


def _chosen(args: argparse.Namespace, store: AdapterStore) -> list[tuple[str, float]]:
    """Slugs and scales to fold; refused where there are none, or one is stale or quarantined."""
    chosen = models.chosen_stack(args, store)
    if not chosen:
        raise UserError(
            "No adapter is active in the store.", "Name some with --adapters, or activate them."
        )
    for slug, _ in chosen:
        after("merge", slug, store.get(slug).status)
    return chosen


def _tell_view(
    stack: list[tuple[StoredAdapter, float]], from_4bit_view: bool, console: Console
) -> None:
    """Words where the weights to be written are not those that an adapter was trained on."""
    for adapter, _ in stack:
        nf4 = adapter.manifest.base.get("view", {}).get("quantization") == "nf4"
        if from_4bit_view and not nf4:
            console.words(
                f"Warning: {adapter.slug} is not recorded as trained on the 4-bit view: folding "
                "into it costs quality and brings it no nearer to what was measured."
            )
        elif nf4 and not from_4bit_view:
            console.words(
                f"Note: {adapter.slug} was trained on the base as nf4: on the original weights its "
                "effect differs a little. --from-4bit-view folds into what it was trained on."
            )


def _loaded_dtype(stack: list[tuple[StoredAdapter, float]]) -> Any:
    """The dtype from which the base was quantised when these adapters were trained."""
    views = [adapter.manifest.base.get("view", {}) for adapter, _ in stack]
    # Not every manifest records the dtype: then the stored one is the best guess.
    dtypes = sorted({v["dtype"] for v in views if v.get("quantization") == "nf4" and "dtype" in v})
    if len(dtypes) > 1:
        raise UserError(
            f"The adapters were trained on 4-bit views made from {' and '.join(dtypes)}: they are "
            "different matrices.",
            "Merge into the original weights, without --from-4bit-view.",
        )
    return dtypes[0] if dtypes else None


def run_merge(args: argparse.Namespace, console: Console) -> int:
    """Writes the merged model and prints where it is."""
    made = merge_release(args, console)
    console.text(str(args.out))
    console.result(made)
    return 0


def merge_release(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The merged model's folder, adapters and figures, once its weights and card are written."""
    if args.load_in_4bit:
        raise UserError(
            "Adapters are never merged into 4-bit weights: rounding to 4 bits again undoes most of "
            "the forgetting.",
            "Leave out --load-in-4bit, then quantise and evaluate; --from-4bit-view folds a QLoRA "
            "adapter into the base as it saw it.",
        )
    store = options.open_store(args)
    chosen = _chosen(args, store)
    console.words(f"Reading {args.base} ...")
    base = resolve_base(args.base, args.revision)
    require_full_weights(base)  # before it is compared: a quantised copy is another base too
    fingerprint = fingerprint_base(base)
    stack = [(store.require_whole(slug, fingerprint), scale) for slug, scale in chosen]
    _tell_view(stack, args.from_4bit_view, console)
    folders = [(adapter.path, scale) for adapter, scale in stack]
    console.words(f"Folding {', '.join(slug for slug, _ in chosen)} into {args.out} ...")
    dtype = None if args.dtype == "auto" else args.dtype
    merged = fold_stack(
        base,
        folders,
        args.out,
        dtype,
        from_4bit_view=args.from_4bit_view,
        loaded_dtype=_loaded_dtype(stack) if args.from_4bit_view else None,
    )
    manifests = tuple((adapter.manifest, scale) for adapter, scale in stack)
    release = Release(
        store.base_name(),
        fingerprint.digest,
        manifests,
        merged,
        revision=args.revision,
        candidates=args.candidates,
        formulas={n: o.formula for n, o in OBJECTIVES.items()} | OPTION_FORMULAS,
    )
    # Write the card before measuring: after an interruption it is there and says "not measured".
    write_release(release)
    store.mark_merged([slug for slug, _ in chosen], args.out.name)
    figures = _figures(args, console)
    if figures is not None:
        write_release(replace(release, **figures))
    return {
        "out": args.out,
        "base": args.base,
        "adapters": [slug for slug, _ in chosen],
        "table": [{"name": slug, "scale": scale} for slug, scale in chosen],
        "merge": vars(merged),
        "figures": figures,
    }


def _figures(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Figures before and after, from the files as written; None without --split."""
    if args.split is None:
        console.hint(
            "measure the merged files before you release them: "
            f"`unlearner evaluate --base {args.out} --adapters none`, with the --split or --rows "
            "that you measured before."
        )
        return None
    from evaluation.robustness.released import measure_release
    from evaluation.suite import load_eval_data

    console.words(f"Measuring {args.base} and {args.out} on {args.split} ...")
    found = measure_release(
        BaseSpec(args.base, args.revision),
        args.out,
        load_eval_data(args.split, args.data),
        protocol=args.protocol,
        retain_log=read_log(args.reference_log) if args.reference_log else None,
        template=args.template,
        system=args.system,
        limit=args.limit,
        on_progress=progress_of(console),
    )
    rows = [{"name": "before", **found.before}, {"name": "after", **found.after}]
    console.table(rows, ["name", *found.after])
    return found._asdict()
