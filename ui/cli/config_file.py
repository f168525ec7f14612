"""The settings of a command as YAML: read from --config and --preset, and written as resolved.

A key is the name of a flag with `_` for `-`, a value what the flag takes; its text goes through the
parser of the flag, so that a file and a command line refuse the same. jsonargparse and TRL's
TrlParser do not make this smaller: the first wants every command declared to it again, the second
takes dataclasses and imports torch; neither names the line of an unknown key.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import write_bytes
from adapters.errors import UserError, did_you_mean
from unlearner import distributed as ranks

if TYPE_CHECKING:
    import yaml

    from ui.cli.parser import Parser

# Flags of one call, which are no settings of a run.
OF_ONE_CALL = {"help", "help_all", "config", "json", "debug", "dry_run", "resume", "restart"}
_NULL, _BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"


def settings_of(parser: Parser) -> dict[str, argparse.Action]:
    """The flags and arguments that a config may set, by key; `preset` among them."""
    settings: dict[str, argparse.Action] = {}
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        long = [name[2:] for name in action.option_strings if name.startswith("--")]
        key = (long[0] if long else action.dest).replace("-", "_")
        taken = any(other.dest == action.dest for other in settings.values())
        hidden = action.help == argparse.SUPPRESS
        if key not in OF_ONE_CALL and not taken and not hidden:
            settings[key] = action
    return settings


@dataclass(frozen=True)
class Config:
    """What a YAML file sets.

    Attributes:
        path: of the file.
        values: by the names that the parser stores them under.
        lines: by the same names, the key as it is called in the file, and its line.
    """

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, tuple[str, int]]

    def without(self, names: Collection[str]) -> Config:
        """What is left of it when these are given on the command line."""
        values = {name: value for name, value in self.values.items() if name not in names}
        return Config(self.path, values, {name: self.lines[name] for name in values})


@contextmanager
def lines_named(config: Config | None) -> Iterator[None]:
    """Inside, an error that names a key or a value of `config` says in which line it is."""
    try:
        yield
    except UserError as error:
        if config is not None:
            error.problem += _places(config, error.problem, error.fix)
            error.args = (error.problem,)
        raise


def _places(config: Config, problem: str, fix: str) -> str:
    """Where the file sets what an error names, as a sentence; empty where it sets none of it."""
    places = []
    for name, (key, line) in config.lines.items():
        value = config.values[name]
        many = isinstance(value, list | tuple)
        values = [text for text in map(str, value if many else [value]) if text]
        flag = key.replace("_", "[_-]")
        # `base` or `rows` alone may be a plain word of the sentence.
        named = [rf"--{flag}", *(rf"{flag} '?{re.escape(text)}" for text in values)]
        named += [flag] if "_" in key else []
        names = [text for text in values if not _is_number(text)]
        named += [re.escape(text) for text in names if many or re.search("[^a-z0-9]", text)]
        named += [f"'{re.escape(text)}'" for text in values]
        in_fix = re.search(rf"--{flag}(?!\w)", fix)
        if in_fix or any(re.search(rf"(?<!\w){pattern}(?!\w)", problem) for pattern in named):
            places.append(f"line {line}: {key}")
    return f" Set in {config.path}, {', '.join(places)}." if places else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("True", "False", "None")
    return True


def read_config(path: Path, parser: Parser) -> Config:
    """The settings in a YAML file.

    Raises:
        UserError: the file cannot be read, or every unknown key and bad value with its line.
    """
    import yaml

    from unlearner.request.rows import refuse_problems

    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(
            f"The config {path} cannot be read: {error.strerror}.", "Give --config a YAML file."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(
            f"{path}{where} is not YAML: {getattr(error, 'problem', None) or error}.",
            "Write `key: value`, one a line.",
        ) from error
    if root is None:
        return Config(path, {}, {})
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} is not a list of settings.", "Write `key: value`, one a line.")
    settings, values, lines = settings_of(parser), dict[str, Any](), dict[str, int]()
    places: dict[str, tuple[str, int]] = {}
    problems = []
    for key_node, node in root.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value).replace("-", "_")
        try:
            if key in lines:
                raise UserError(f"{key} is given in line {lines[key]} already")
            lines[key] = line
            action = settings.get(key)
            if action is None:
                raise UserError(_unknown(key, parser, settings))
            if node.tag != _NULL and not (node.value == "None" and node.style is None):
                values[action.dest] = _value(parser, action, node)
                places[action.dest] = key, line
                if other := _excluded(parser, action, values):
                    raise UserError(f"{key} and {other} exclude each other")
        except (UserError, argparse.ArgumentError) as error:
            text = error.message if isinstance(error, argparse.ArgumentError) else str(error)
            text = text if key in text else f"{key}: {text}"
            problems.append((f"line {line}", text.rstrip(".")))
    refuse_problems(str(path), problems, f"See `{parser.prog} --help-all` for all settings.")
    return Config(path, values, places)


def _excluded(parser: Parser, action: argparse.Action, values: Mapping[str, Any]) -> str | None:
    """The setting among `values` that excludes that of `action`."""
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions and values[action.dest]:
            for other in group._group_actions:
                if other.dest != action.dest and values.get(other.dest):
                    return other.dest
    return None


def _unknown(key: str, parser: Parser, settings: Mapping[str, Any]) -> str:
    if key in OF_ONE_CALL:
        return f"{key} is for one call only: give it on the command line"
    hint = did_you_mean(key, settings)
    near = "" if hint.startswith("Known are") else f" {hint}"
    return f"`{parser.prog}` has no setting '{key}'.{near}"


def _value(parser: Parser, action: argparse.Action, node: yaml.Node) -> Any:
    """The value of a node as the flag would store it."""
    import yaml

    yes = node.tag == _BOOL and str(node.value).lower() in ("true", "yes", "on")
    if action.nargs == 0:
        if node.tag != _BOOL:
            raise UserError("write true or false")
        return yes
    if action.nargs == "?" and yes:  # the flag without a word
        return action.const
    if isinstance(node, yaml.SequenceNode) and not node.value:
        return []
    many = isinstance(action, argparse._AppendAction) or action.nargs in ("+", "*")
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError("write one value, or a list of values")
    texts = [str(item.value) for item in items]
    values = []
    for text in texts if many else [",".join(texts)]:
        value = parser._get_value(action, text)
        if not many:
            parser._check_value(action, value)
        values.append(value)
    return values if many else values[0]


def apply_config(parser: Parser, words: Sequence[str]) -> list[str]:
    """`words` after --config and --preset were made the defaults of the command's parser.

    A flag wins over the config, and the config over the preset. `--no-NAME` switches off what one
    of them switches on; such words are taken out.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--config", "--preset"):
        if name in parser._option_string_actions:
            named.add_argument(name)
    try:
        given, _ = named.parse_known_args(list(words))
    except argparse.ArgumentError:  # a flag without its value: the command's parser says so
        return list(words)
    path = getattr(given, "config", None)
    config = read_config(Path(path), parser) if path else Config(Path(), {}, {})
    kept, off = _without_negations(parser, words)
    config = config.without({*off, *_given(parser, kept)})
    _set_defaults(parser, config.values, kept)
    parser.set_defaults(config_lines=config)
    preset = getattr(given, "preset", None) or config.values.get("preset")
    if preset is not None and parser.get_default("preset_keys") is not None:
        with lines_named(config):
            more = _preset_values(parser, preset, kept)
        known = {*config.values, *off}
        _set_defaults(parser, {k: v for k, v in more.items() if k not in known}, kept)
    return kept if path or preset else list(words)


def _without_negations(parser: Parser, words: Sequence[str]) -> tuple[list[str], set[str]]:
    """The words without each `--no-NAME` of a flag that only says yes, and the names of these."""
    kept, off = [], set()
    for word in words:
        action = parser._option_string_actions.get("--" + word.removeprefix("--no-"))
        negates = word.startswith("--no-") and word not in parser._option_string_actions
        if negates and isinstance(action, argparse._StoreTrueAction):
            off.add(action.dest)
        else:
            kept.append(word)
    return kept, off


def _given(parser: Parser, words: Sequence[str]) -> set[str]:
    """What the flags among `words` set, by the names that the parser stores it under."""
    flags = parser._option_string_actions
    return {flags[name].dest for word in words if (name := word.split("=")[0]) in flags}


def _set_defaults(parser: Parser, values: Mapping[str, Any], words: Sequence[str]) -> None:
    """Make `values` the defaults, save where `words` give the flag or one that excludes it."""
    given = _given(parser, words)
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        if members & given:
            given |= members
        if members & set(values):
            group.required = False
    for action in parser._actions:
        if action.dest in values and action.dest not in given:
            action.default, action.required = values[action.dest], False


@contextmanager
def nothing_required(parser: Parser) -> Iterator[None]:
    """Inside, every flag and argument of the parser may be left out."""
    needed: list[Any] = [*parser._actions, *parser._mutually_exclusive_groups]
    needed = [each for each in needed if each.required]
    for each in needed:
        each.required = False
    try:
        yield
    finally:
        for each in needed:
            each.required = True


def _preset_values(parser: Parser, name: str, words: Sequence[str]) -> dict[str, Any]:
    """What the preset says of this command's settings, for its objective and split."""
    from evaluation.experiments.presets import preset_settings
    from unlearner.request.tofu import FORGET_SPLITS, split_name

    command = parser.words
    with nothing_required(parser):
        args, _ = parser.parse_known_args(list(words[len(command) :]))
    texts = [str(getattr(args, key, None) or "") for key in ("split", "request")]
    split = next((s for s in map(split_name, texts) if s in FORGET_SPLITS), None)
    settings = preset_settings(name, getattr(args, "objective", "simnpo"), split, command[0])
    keys = parser.get_default("preset_keys")
    values = {key: value for key, value in settings.items() if key in keys}
    if not values:
        raise UserError(
            f"The preset '{name}' has no settings for `{parser.prog}`.", "Leave out --preset."
        )
    for key, action in settings_of(parser).items():
        if key == "protocol" and key in values:
            values[key] = parser._get_value(action, values[key])
        if action.choices is not None and values.get(key) not in action.choices:
            values.pop(key, None)
    return values


def resolved(
    parser: Parser, args: argparse.Namespace, changes: Mapping[str, Any] | None = None
) -> str:
    """The settings of a run as YAML, one a line with what it is for.

    Args:
        parser: of the command.
        args: its parsed arguments.
        changes: values in place of those of `args`, by their names there.
    """
    import yaml

    changes = {**(args.resolve(args) if hasattr(args, "resolve") else {}), **(changes or {})}
    own = parser.get_default("preset_keys") is not None
    lines = [f"# Settings of `{parser.prog}`, for its --config; null: not given"]
    for key, action in settings_of(parser).items():
        if key == "preset" and own:  # its settings are written out
            continue
        value = changes.get(action.dest, getattr(args, action.dest, None))
        listed = yaml.safe_dump(
            [_plain(value)], default_flow_style=True, allow_unicode=True, width=float("inf")
        )
        needed = "required: " if action.required and value is None else ""
        lines.append(f"{key}: {listed.strip()[1:-1]}  # {needed}{_comment(parser, action)}")
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _comment(parser: Parser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else action.dest
    return re.sub(r" \(default: [^()]*(\([^()]*\)[^()]*)*\)$", "", " ".join(text.split()))


def keep_beside(args: argparse.Namespace) -> None:
    """Write the resolved settings into the folder of --out, where the command made one.

    Not beside merged weights: they are made to be released, and the settings name local paths.
    """
    parser, out = getattr(args, "parser", None), getattr(args, "out", None)
    if parser is None or "--config" not in parser._option_string_actions or ranks.rank() != 0:
        return
    if parser.words == ["merge"]:
        return
    from adapters.store.catalog import SETTINGS_NAME

    if isinstance(out, Path) and out.is_dir() and not getattr(args, "dry_run", False):
        write_bytes(out / SETTINGS_NAME, resolved(parser, args).encode())
