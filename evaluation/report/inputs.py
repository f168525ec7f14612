"""What a report is made from: logs by name and cards, as they are named or lie in folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapters.errors import UserError
from evaluation.report.cards import CALIBRATION, ROBUSTNESS, TUNE, read_json

LOG_FILE = "eval_log.json"
RESULT = "result.json"
RETRAIN = "retrain"


@dataclass(frozen=True)
class Inputs:
    """The files of a report, each as it was named or found.

    Attributes:
        logs: evaluation logs by the name of their system, in the order of the table.
        robustness, calibration: cards.
        results: what `reproduce` wrote (its settings and its split).
        tune: what a search wrote.
    """

    logs: Mapping[str, Path] = field(default_factory=dict)
    robustness: tuple[Path, ...] = ()
    calibration: tuple[Path, ...] = ()
    results: tuple[Path, ...] = ()
    tune: tuple[Path, ...] = ()


def find_inputs(
    texts: Sequence[str], robustness: Sequence[Path] = (), calibration: Sequence[Path] = ()
) -> Inputs:
    """The files that the words of the command name; folders are looked through.

    Args:
        texts: `NAME=LOG`, a log, or a folder that evaluate, reproduce or quickstart wrote.
        robustness, calibration: cards named by flags.

    Raises:
        UserError: no such file, a folder without a log or card, or a name given twice.
    """
    logs: dict[str, Path] = {}
    cards: dict[str, list[Path]] = {ROBUSTNESS: [*robustness], CALIBRATION: [*calibration]}
    others: dict[str, list[Path]] = {RESULT: [], TUNE: []}
    for text in texts:
        name, path = split_name(text)
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.", "Check the path.")
        if not path.is_dir():
            _add(logs, name or log_name(path), path)
            continue
        found = folder_logs(path)
        there = [
            (kind, one)
            for kind in (*cards, *others)
            for one in [path / kind, *sorted(path.glob(f"*/{kind}"))]
            if one.is_file()
        ]
        if not found and not there:
            raise UserError(
                f"{path} holds no {LOG_FILE}, logs/*.json, {RESULT} or card ({', '.join(cards)}).",
                "Name the folder that evaluate, reproduce or quickstart wrote, or NAME=LOG.",
            )
        if name is not None and len(found) > 1:
            raise UserError(
                f"{path} holds {len(found)} logs, so it cannot be called {name!r}.",
                "Leave out the name, or name each log: NAME=LOG.",
            )
        for own, one in found.items():
            _add(logs, name or own, one)
        for kind, one in there:
            kept = cards[kind] if kind in cards else others[kind]
            if one.resolve() not in {other.resolve() for other in kept}:
                kept.append(one)
    return Inputs(
        logs, *(tuple(found) for found in (*cards.values(), others[RESULT], others[TUNE]))
    )


def split_name(text: str) -> tuple[str | None, Path]:
    """`NAME=LOG` as name and path; a path that exists is never split."""
    name, sign, rest = text.partition("=")
    if not sign or Path(text).exists() or "/" in name:
        return None, Path(text)
    if not name.strip() or not rest:
        raise UserError(f"{text!r} is not NAME=LOG.", "Write for example simnpo=eval_log.json.")
    return name.strip(), Path(rest)


def log_name(path: Path) -> str:
    """What a log is called without a name: its folder's where the file's says nothing."""
    plain = path.name in (LOG_FILE, "log.json", "eval_log_aggregated.json", "TOFU_EVAL.json")
    return path.resolve().parent.name if plain else path.stem


def named_logs(paths: Sequence[Path]) -> list[str]:
    """Logs as `find_inputs` takes them: NAME=LOG where two would have the same name."""
    pairs = zip(log_names(paths), paths, strict=True)
    return [str(path) if name == log_name(path) else f"{name}={path}" for name, path in pairs]


def log_names(paths: Sequence[Path]) -> list[str]:
    """A name for each log, all different: `log_name`, numbered where several would share one."""
    found: list[str] = []
    for path in paths:
        name, number = log_name(path), 1
        while name in found:
            number += 1
            name = f"{log_name(path)} ({number})"
        found.append(name)
    return found


def _add(logs: dict[str, Path], name: str, path: Path) -> None:
    if name in logs and logs[name].resolve() != path.resolve():
        raise UserError(
            f"Two logs are called {name!r}: {logs[name]} and {path}.",
            "Name them: NAME=LOG.",
        )
    logs[name] = path


def folder_logs(folder: Path) -> dict[str, Path]:
    """The logs in a folder of evaluate (one, or one a system), reproduce or quickstart."""
    if (folder / RESULT).is_file():
        named = read_json(folder / RESULT).get("logs")
        if not isinstance(named, dict):
            raise UserError(f"{folder / RESULT} names no logs.", "Run `unlearner reproduce` again.")
        return {str(name): _moved(folder, Path(str(path))) for name, path in named.items()}
    if (folder / LOG_FILE).is_file():
        return {folder.resolve().name: folder / LOG_FILE}
    found = {path.stem: path for path in sorted((folder / "logs").glob("*.json"))}
    found |= {path.parent.name: path for path in sorted(folder.glob(f"*/{LOG_FILE}"))}
    first = {"origin": 0, RETRAIN: 1}
    return dict(sorted(found.items(), key=lambda pair: (first.get(pair[0], 2), pair[0])))


def _moved(folder: Path, path: Path) -> Path:
    """Where a log that `reproduce` named lies now: beside its result, also after a move."""
    for own in (folder / path.parent.name / path.name, path):
        if own.is_file():
            return own
    raise UserError(
        f"{folder / RESULT} names the log {path}, which is gone.", "Name the logs: NAME=LOG."
    )
