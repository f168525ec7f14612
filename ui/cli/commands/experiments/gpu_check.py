"""`unlearner gpu-check`: everything that only a card can show, in one table."""

from __future__ import annotations

import argparse
from typing import Any

from adapters.errors import UserError
from ui.cli import options
from ui.console import Console


def register(commands: Any) -> None:
    """Adds the command."""
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
