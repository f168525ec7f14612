"""The logs and cards that a report is made from: named, or found in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from adapters.errors import UserError
from evaluation.report.cards import CALIBRATION, ROBUSTNESS, TUNE, read_object

LOG_FILE = "eval_log.json"
RESULT = "result.json"
RETRAIN = "retrain"


class Inputs(NamedTuple):
    """The files of a report: logs by the name of their system in the table's order, and cards.

    `cards` has for each of the names under which a command writes its card those that were found:
    `ROBUSTNESS`, `CALIBRATION`, `TUNE` and `RESULT` (of `reproduce`: its settings and its split).
    """

    logs: dict[str, Path]
    cards: dict[str, list[Path]]


def find_inputs(
    texts: Sequence[str], robustness: Sequence[Path] = (), calibration: Sequence[Path] = ()
) -> Inputs:
    """The files that `texts` name; folders are searched.

    Args:
        texts: `NAME=LOG`, a log, or a folder that evaluate, reproduce or quickstart wrote.
        robustness, calibration: cards in addition to those in folders.

    Raises:
        UserError: no such file, a folder without a log or card, or a name given twice.
    """
    logs: dict[str, Path] = {}
    cards = {ROBUSTNESS: [*robustness], CALIBRATION: [*calibration], RESULT: [], TUNE: []}
    for text in texts:
        name, path = _split_name(text)
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.", "Check the path.")
        folder = _folder_logs(path) if path.is_dir() else {log_name(path): path}
        folder_cards = [
            (kind, file)
            for kind in cards
            for file in [path / kind, *sorted(path.glob(f"*/{kind}"))]
            if file.is_file()
        ]
        if not folder and not folder_cards:
            raise UserError(
                f"{path} holds no {LOG_FILE}, logs/*.json or card ({', '.join(cards)}).",
                "Name a folder that evaluate, reproduce or quickstart wrote, or NAME=LOG.",
            )
        if name is not None and len(folder) > 1:
            raise UserError(
                f"{path} holds {len(folder)} logs, so it cannot be named {name!r}.",
                "Leave out the name, or name each log: NAME=LOG.",
            )
        for default, file in folder.items():
            key = name or default
            if key in logs and logs[key].resolve() != file.resolve():
                raise UserError(
                    f"Two logs are named {key!r}: {logs[key]} and {file}.",
                    "Give each a different name: NAME=LOG.",
                )
            logs[key] = file
        for kind, file in folder_cards:
            if file.resolve() not in {other.resolve() for other in cards[kind]}:
                cards[kind].append(file)
    return Inputs(logs, cards)


def _split_name(text: str) -> tuple[str | None, Path]:
    """`NAME=LOG` as name and path; a path that exists is never split."""
    name, sign, rest = text.partition("=")
    if not sign or Path(text).exists() or "/" in name:
        return None, Path(text)
    if not name.strip() or not rest:
        raise UserError(f"{text!r} is not NAME=LOG.", "Write for example simnpo=eval_log.json.")
    return name.strip(), Path(rest)


def log_name(path: Path) -> str:
    """The default name of a log: the file's, or its folder's where all files are named alike."""
    common = path.name in (LOG_FILE, "log.json", "eval_log_aggregated.json", "TOFU_EVAL.json")
    return path.resolve().parent.name if common else path.stem


def log_names(paths: Sequence[Path]) -> list[str]:
    """A different name for each log: `log_name`, numbered where several would share one."""
    names: list[str] = []
    for path in paths:
        name, number = log_name(path), 1
        while name in names:
            number += 1
            name = f"{log_name(path)} ({number})"
        names.append(name)
    return names


def named_logs(paths: Sequence[Path]) -> list[str]:
    """Logs as `find_inputs` takes them: NAME=LOG where two would share a name."""
    pairs = zip(log_names(paths), paths, strict=True)
    return [str(path) if name == log_name(path) else f"{name}={path}" for name, path in pairs]


def _folder_logs(folder: Path) -> dict[str, Path]:
    """The logs in a folder of evaluate (one, or one for each system), reproduce or quickstart."""
    result = folder / RESULT
    if result.is_file():
        logs = read_object(result).get("logs")
        if not isinstance(logs, dict):
            raise UserError(f"{result} names no logs.", "Run `unlearner reproduce` again.")
        paths = {}
        for name, path in ((str(name), Path(str(path))) for name, path in logs.items()):
            # Beside its result, also after the folder was moved.
            beside = folder / path.parent.name / path.name
            paths[name] = beside if beside.is_file() else path
            if not paths[name].is_file():
                problem = f"{result} names the log {path}, which is gone."
                raise UserError(problem, "Name the logs: NAME=LOG.")
        return paths
    if (folder / LOG_FILE).is_file():
        return {folder.resolve().name: folder / LOG_FILE}
    paths = {path.stem: path for path in sorted((folder / "logs").glob("*.json"))}
    paths |= {path.parent.name: path for path in sorted(folder.glob(f"*/{LOG_FILE}"))}
    first = {"origin": 0, RETRAIN: 1}
    return dict(sorted(paths.items(), key=lambda pair: (first.get(pair[0], 2), pair[0])))
