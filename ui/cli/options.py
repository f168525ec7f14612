"""The flags that commands share, and the parser whose errors are a problem and a fix."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError, did_you_mean
from adapters.store.store import AdapterStore
from evaluation.protocols import DEFAULT, PROTOCOLS, protocol_named, protocols_named
from ui.cli.parser import Parser as Parser
from unlearner.config import LoraShape, ObjectiveConfig, TrainConfig, default_objective
from unlearner.objectives.registry import OBJECTIVES
from unlearner.request.formats import Columns
from unlearner.request.tofu import FORGET_SPLITS, split_name
from unlearner.tokens.prompts import PromptFormat, prompt_format

DEFAULT_STORE = "./forget-store"
PRESETS = ("mini", "smollm2-135m", "llama2-7b", "llama3.2-1b", "llama3.2-3b")
Flags = argparse._ActionsContainer  # a parser, or a group of its flags


def whole_number(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def seed(text: str) -> int:
    """A whole number that every random generator takes."""
    value = whole_number(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 2^32)")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def folder(text: str) -> Path:
    """The path of a folder, which need not exist."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, and a folder is needed")
    return path


def number_list(text: str) -> tuple[float, ...]:
    """Numbers divided by commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers, as in 1,0.5"
        ) from None


def name_list(text: str) -> list[str]:
    """Names divided by commas; "none" is the empty list."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["none"] else names


# What a flag takes, for `add_argument`.
COUNT: dict[str, Any] = {"type": positive_int, "metavar": "N"}
NUMBER: dict[str, Any] = {"type": float, "metavar": "X"}
NAMES: dict[str, Any] = {"type": name_list, "metavar": "A,B"}
FILE: dict[str, Any] = {"type": Path, "metavar": "FILE"}
FOLDER: dict[str, Any] = {"type": Path, "metavar": "DIR"}
LOG: dict[str, Any] = {"type": Path, "metavar": "LOG"}


def require_known(name: str, known: Iterable[str], problem: str) -> None:
    """Refuses a name that is not known, with the nearest one that is."""
    if name not in (names := list(known)):
        raise UserError(problem, did_you_mean(name, names))


def require_split(name: str) -> None:
    """Refuses what is no forget split of TOFU, with the nearest one."""
    require_known(name, FORGET_SPLITS, f"'{name}' is not a forget split.")


def add_command(
    commands: Any,
    name: str,
    run: Callable[..., int],
    takes: str = "",
    *,
    config: Sequence[str] | None = None,
    **words: str,
) -> Parser:
    """The parser of a command, with the flags that several commands share.

    Args:
        commands: of the parser above it.
        name: of the command.
        run: called with the arguments and the console; gives the exit code.
        takes: which flags of `SHARED`, divided by blanks.
        config: adds --config, and --preset where a preset has some of these settings.
        words: help, description and epilog.
    """
    parser: Parser = commands.add_parser(name, **words)
    for each in takes.split():
        SHARED[each](parser)
    if config is not None:
        _add_config(parser, config)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="one JSON object on stdout instead of text"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def _add_config(parser: Parser, preset_keys: Sequence[str]) -> None:
    group = parser.add_argument_group("settings from a file")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with settings of this command, which flags overrule; `unlearner config` prints "
        "one",
    )
    if preset_keys:
        group.add_argument(
            "--preset",
            metavar="NAME",
            help=f"settings of a preset of `reproduce`: {', '.join(PRESETS)}",
        )
        parser.set_defaults(preset_keys=preset_keys)


def _add_data(parser: Parser) -> None:
    parser.add_argument(
        "--data",
        type=_data_folder,
        metavar="DIR",
        default=Path(named) if (named := os.environ.get("UNLEARNER_DATA")) else None,
        help="folder of TOFU's JSON-lines files instead of the hub's locuslab/TOFU "
        "(environment: UNLEARNER_DATA)",
    )


def _data_folder(text: str) -> Path:
    if Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text} is a file, and --data takes the folder of TOFU's files; rows of your own are "
            "given where their flag or argument says so"
        )
    return Path(text)


def _add_store(parser: Parser) -> None:
    parser.add_argument(
        "--store",
        **FOLDER,
        default=os.environ.get("UNLEARNER_STORE") or None,
        help="folder of the forget adapters "
        f"(environment: UNLEARNER_STORE; default: {DEFAULT_STORE})",
    )


def store_path(args: argparse.Namespace) -> Path:
    """The store that was named, else the default one; it need not exist."""
    return args.store if args.store is not None else Path(DEFAULT_STORE)


def open_store(args: argparse.Namespace) -> AdapterStore:
    """The store that was named, which must exist."""
    return AdapterStore.open(store_path(args))


def add_base(
    flags: Flags,
    *,
    required: bool = True,
    text: str = "hub id, folder or GGUF file of the base model",
) -> None:
    """--base and --revision; `text` says what the base is for."""
    flags.add_argument("--base", required=required, metavar="B", help=text)
    flags.add_argument("--revision", metavar="REV", help="commit, tag or branch of a hub base")


REQUEST_HELP = (
    "rows to forget: a file (JSONL, JSON, CSV, TSV or Parquet, also gzipped), a folder that "
    "`datasets` saved, hub:OWNER/NAME:SPLIT, a TOFU split such as forget05, or 'tofu:author=NAME'"
)


def add_split(
    flags: Flags,
    *,
    required: bool = False,
    default: str | None = None,
    text: str = "forget split: forget01, forget05 or forget10",
) -> None:
    """--split; `tofu:forget05` is accepted for `forget05`."""
    shown = f"{text} (default: {default})" if default else text
    flags.add_argument(
        "--split", type=split_name, required=required, default=default, metavar="SPLIT", help=shown
    )


def add_reference_log(
    flags: Flags, *, required: bool = False, use: str = "needed for forget quality"
) -> None:
    """--reference-log; `use` says what this command does with it."""
    flags.add_argument(
        "--reference-log",
        **LOG,
        required=required,
        help=f"evaluation log of a model that never saw the forget set: {use}",
    )


def add_second_reference_log(flags: Flags) -> None:
    """--second-reference-log."""
    flags.add_argument(
        "--second-reference-log",
        **LOG,
        help="log of a second such model; the difference between the two references is the range "
        "within which forget quality cannot tell models apart",
    )


def add_protocol(flags: Flags, *, several: bool = False, default: str | None = DEFAULT) -> None:
    """--protocol: one name, or with `several` a list of names."""
    choices = ", ".join(PROTOCOLS)
    kind: Callable[[str], Any] = _protocols if several else lambda text: protocol_named(text).name
    flags.add_argument(
        "--protocol",
        type=kind,
        default=default,
        metavar="NAME",
        help=f"{choices}{', several separated by commas, or all' if several else ''} "
        f"(default: {default or 'as the first log says'})",
    )


def _protocols(text: str) -> list[str]:
    return [protocol.name for protocol in protocols_named(text)]


def add_limit(flags: Flags, text: str = "measure only the first N rows of each set") -> None:
    """--limit."""
    flags.add_argument(
        "--limit",
        **COUNT,
        help=f"{text}: a quick look, not comparable with full figures",
    )


def add_out(flags: Flags, text: str, *, default: str | None = None, required: bool = False) -> None:
    """--out, always a folder that is made where it is missing; `text` says what is in it."""
    flags.add_argument(
        "--out",
        type=folder,
        required=required,
        default=default,
        metavar="DIR",
        help=f"{text} (default: ./{default})" if default else text,
    )


REF = "slug, its unique start, or label"


def add_adapters(flags: Flags, text: str = "use these adapters in this order, or none") -> None:
    """--adapters."""
    flags.add_argument(
        "--adapters",
        **NAMES,
        help=f"{text}; each by {REF} (default: those active in the store)",
    )


def add_scales(flags: Flags, of: str = "of --adapters") -> None:
    """--scales, one factor for each adapter."""
    flags.add_argument(
        "--scales",
        type=number_list,
        metavar="X,Y",
        help=f"strength of each adapter {of}, 0 to 1.5 (default: 1, as trained)",
    )


def scales_by_ref(args: argparse.Namespace, refs: Sequence[str] | None) -> dict[str, float]:
    """The numbers of --scales by the adapter that each is for; empty where it was not given.

    Raises:
        UserError: more or fewer numbers than adapters.
    """
    if args.scales is None:
        return {}
    refs = refs or ()
    if len(args.scales) != len(refs):
        raise UserError(
            f"--scales has {len(args.scales)} numbers for {len(refs)} adapters.",
            "Name the adapters, and give one number for each, divided by commas.",
        )
    return dict(zip(refs, args.scales, strict=True))


def add_questions_per_batch(flags: Flags) -> None:
    """--questions-per-batch."""
    flags.add_argument(
        "--questions-per-batch",
        **COUNT,
        help="questions answered at once; reduce it when out of memory",
    )


def add_fail_if(flags: Flags, example: str) -> None:
    """--fail-if; `example` is a condition on a figure of this command."""
    flags.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="GATE",
        help=f'exit with code 4 if true, e.g. "{example}"; may be repeated',
    )


def add_retain(flags: Flags, text: str = "rows to keep", *, default: str = "") -> None:
    """--retain; `default` says which rows are taken without the flag."""
    tail = f" (default: {default})" if default else ""
    flags.add_argument(
        "--retain", metavar="ROWS", help=f"{text}: a file, hub:OWNER/NAME or a TOFU split{tail}"
    )


def add_columns(flags: Flags) -> None:
    """--question-column and --answer-column."""
    for key in ("question", "answer"):
        flags.add_argument(
            f"--{key}-column",
            metavar="NAME",
            help=f"column of the {key} in your files (default: found by its usual names)",
        )


def columns(args: argparse.Namespace) -> Columns:
    """The columns that these flags name."""
    return Columns(args.question_column, args.answer_column)


def _add_template(parser: Parser) -> None:
    """--template and --system, of every command that reads prompts."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt of every row; `none` removes the one that a chat template inserts by "
        "itself (default: the template's own)",
    )
    parser.add_argument(
        "--template",
        choices=("auto", "llama2", "chat", "open-unlearning"),
        default="auto",
        help="prompt format: TOFU's plain Llama-2 text, the tokenizer's chat template, that "
        "template as open-unlearning's Llama-3 models were trained with it (system prompt and "
        "date), or whichever of the first two fits the tokenizer (default: auto)",
    )


def add_loading(parser: Parser, *, either_way: bool = False) -> None:
    """--dtype, --load-in-4bit, --device, --attention: how the base is held in memory.

    `either_way` adds --no-load-in-4bit, for commands where 4 bit may be the default.
    """
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights in memory (default: auto: bfloat16 on a GPU, float32 on a CPU)",
    )
    four_bit: dict[str, Any] = {"action": "store_true"}
    if either_way:
        four_bit = {"action": argparse.BooleanOptionalAction, "default": None}
    group.add_argument(
        "--load-in-4bit", **four_bit, help="hold the base as nf4 (needs bitsandbytes)"
    )
    group.add_argument(
        "--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    group.add_argument(
        "--attention",
        choices=("auto", "sdpa", "eager", "flash_attention_2"),
        default="auto",
        help="attention kernel (default: auto: flash_attention_2 where it is installed, else sdpa)",
    )


def base_spec(args: argparse.Namespace) -> BaseSpec:
    """The base that --base and the flags of `add_loading` name."""
    return BaseSpec(
        name=args.base,
        revision=args.revision,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        device=args.device,
        attention=args.attention,
    )


def prompts(args: argparse.Namespace) -> PromptFormat:
    """The prompts of --base, by its tokenizer and the flags --template and --system."""
    return prompt_format(load_tokenizer(args.base, args.revision), args.template, args.system)


# One line on what to turn a knob for; names, types and defaults come from the dataclasses.
SETTING_HELP = {
    "beta": "inverse temperature of the objective; an exponent in wga and satimp",
    "beta2": "SatImp's exponent of 1 - p",
    "gamma": "SimNPO's margin in beta * nll/|y| - gamma; above 0 forgets more",
    "rmu_layer": "block whose output RMU steers, from 0; -1 is the one at 7/32 of the depth",
    "rmu_coefficient": "length of the vector RMU steers forget states to; depends on the model",
    "ceu_skip": "tokens at the beginning of an answer that CE-U leaves alone",
    "forget_weight": "weight of the forget term",
    "retain_weight": "weight of the retain term (the model card's lambda); higher keeps more",
    "guard_weight": "weight of the guard that keeps earlier requests of the stack forgotten",
    "alternates": "train each forget question on so many other answers too, of the retain rows "
    "that ask alike, so that it is answered as by a model that never knew; 0 = off",
    "alternate_weight": "weight of the term of the alternate answers",
    "alternate_smoothing": "label smoothing of the alternate answers, at most that of the base's "
    "own training",
    "attack_weight": "weight of the forget term under a simulated relearning attack, so that "
    "forgetting holds when the model is trained again; 0 = off; forget rows run twice",
    "attack_gamma": "SimNPO's margin in that term",
    "general_weight": "weight of the KL that holds what the base answers to neutral prompts; about "
    "40 percent more time a step; 0 = off",
    "protected_directions": "leave alone so many principal directions of what each layer sees on "
    "neutral prompts and retain rows, so that they are answered as before; 0 = off",
    "settle": "steps after the one that reached the target, in which rows that went too far come "
    "back; -1 = 12 with --alternates, else none",
    "excess_weight": "weight of the square of what a forget row's NLL is above the target",
    "lora_r": "rank of the adapter",
    "lora_alpha": "the update is scaled by alpha / r",
    "lora_dropout": "dropout on the adapter's input while training",
    "target_modules": "linear layers to adapt, by name and divided by commas",
    "learning_rate": "peak learning rate; the first thing to raise when too little is forgotten; "
    "`forget` takes 1e-3 below 1 billion weights (measured on 1.3 and 135 million)",
    "num_train_epochs": "passes over the forget rows",
    "per_device_train_batch_size": "pairs of one forward; reduce to 4, 2, 1 when out of memory",
    "gradient_accumulation_steps": "forwards of one optimizer step; raise it as the batch shrinks",
    "warmup_ratio": "share of the steps with rising learning rate",
    "lr_scheduler_type": "transformers' schedule name",
    "weight_decay": "AdamW's weight decay on the adapter",
    "max_grad_norm": "clip gradients to this norm, 0 = never",
    "max_length": "a row is cut at this many tokens, prompt included",
    "gradient_checkpointing": "recompute activations, slower with less memory: off, all, a number "
    "N for every N-th layer, or auto, as far as it is needed; without a word: all",
    "padded": "padded batches sorted by length instead of packs",
    "attack_steps": "optimizer steps of one simulated attack, after which the next one begins",
    "attack_rate": "learning rate of the simulated attacker; 0 = by the model's size",
    "attack_rank": "rank of the simulated attacker's LoRA",
    "optim": "transformers' optimizer name",
    "seed": "of pairing, order and the adapter's first weights",
}
OBJECTIVE_FIELDS = tuple(
    field.name for field in fields(ObjectiveConfig) if field.name not in ("name", "target")
)
LORA_FIELDS = tuple(field.name for field in fields(LoraShape))
TRAIN_FIELDS = tuple(field.name for field in fields(TrainConfig))
SETTINGS = (*OBJECTIVE_FIELDS, *LORA_FIELDS, *TRAIN_FIELDS)
# What a preset says of a base, whatever is done with it.
OF_BASE = ("base", "template", "load_in_4bit")


def _add_settings(parser: Parser) -> None:
    """--objective, and one flag for each field of the config dataclasses (None = its default)."""
    group = parser.add_argument_group("objective")
    group.add_argument(
        "--objective",
        metavar="NAME",
        default=ObjectiveConfig().name,
        help=f"{', '.join(OBJECTIVES)} (default: {ObjectiveConfig().name})",
    )
    for name in OBJECTIVE_FIELDS:
        kind = type(getattr(ObjectiveConfig(), name))
        _add_setting(group, name, kind, _objective_default(name))
    add_fields(parser.add_argument_group("adapter"), LoraShape)
    add_fields(parser.add_argument_group("training"), TrainConfig)


def add_fields(group: argparse._ArgumentGroup, kind: type) -> None:
    """One flag for each field of the dataclass `kind`."""
    for field in fields(kind):
        value: Any = field.default
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        _add_setting(group, field.name, type(value), "off" if value is False else shown)


def _add_setting(group: argparse._ArgumentGroup, name: str, kind: type, default: str) -> None:
    flag = "--" + name.replace("_", "-")
    text = f"{SETTING_HELP[name]} (default: {default})"
    if name == "gradient_checkpointing" and kind is str:
        group.add_argument(flag, nargs="?", const="all", metavar="HOW", help=text)
    elif kind is bool:
        group.add_argument(flag, action="store_true", default=None, help=text)
    elif kind is tuple:
        group.add_argument(
            flag, type=lambda names: tuple(name_list(names)), metavar="A,B", help=text
        )
    else:
        metavar = {int: "N", float: "X"}.get(kind, "NAME")
        group.add_argument(flag, type=kind, metavar=metavar, help=text)


def _objective_default(name: str) -> str:
    """The value most objectives start with, and those that start with another."""
    values = {objective: getattr(default_objective(objective), name) for objective in OBJECTIVES}
    first = values["simnpo"]
    if isinstance(first, str):
        return first
    others = [f"{objective} {value:g}" for objective, value in values.items() if value != first]
    return "; ".join([f"{first:g}", *others])


def given_settings(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The settings among `names` that were given on the command line."""
    found = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


# The flags that `add_command` can add, by what they name.
SHARED: dict[str, Callable[[Parser], None]] = {
    "base": lambda parser: add_base(parser.add_argument_group("base model")),
    "template": _add_template,
    "loading": add_loading,
    "settings": _add_settings,
    "store": _add_store,
    "data": _add_data,
}
