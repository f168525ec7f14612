"""TOFU's splits, authors and refusals, from the hub or a folder.

TOFU (arXiv 2401.06121, `locuslab/TOFU`) has 200 fictitious authors of 20 rows each, in order;
forget01/05/10 are the last 1/5/10 % of `full` and retain99/95/90 what precedes them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from adapters.errors import UserError, did_you_mean
from unlearner.request.formats import read_hub, read_rows
from unlearner.request.rows import Author, Row

HUB_ID = "locuslab/TOFU"
FORGET_SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
SPLITS = (
    "full",
    *FORGET_SPLITS,
    *FORGET_SPLITS.values(),
    *(f"{name}_perturbed" for name in FORGET_SPLITS),
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
    "world_facts",
    "world_facts_perturbed",
)
# Rows of authors that no TOFU model was trained on, for membership inference.
HOLDOUT_SPLITS = {"forget01": "holdout01", "forget05": "holdout05", "forget10": "holdout10"}
ROWS_PER_AUTHOR = 20
WORLD_FILE = "world.json"


def split_name(text: str) -> str:
    """The name of a split that was written `forget05` or `tofu:forget05`."""
    return text.removeprefix("tofu:")


def load_split(name: str, data: Path | None = None) -> list[Row]:
    """The rows of a TOFU split, in the data set's order.

    Args:
        name: one of `SPLITS` or `HOLDOUT_SPLITS`, with or without `tofu:`.
        data: folder of TOFU's JSON-lines files; without it the hub's `locuslab/TOFU` is read.

    Raises:
        UserError: unknown split, missing folder or file, no way to the hub.
    """
    name = split_name(name)
    if name not in (*SPLITS, *HOLDOUT_SPLITS.values()):
        raise UserError(f"There is no TOFU split '{name}'.", did_you_mean(name, SPLITS))
    if data is None:
        return read_hub(f"{HUB_ID}:{name}:train", unique=False)
    if not data.is_dir():
        raise UserError(
            f"The data folder {data} does not exist.", "Give --data a folder that does."
        )
    for suffix in (".json", ".jsonl"):
        if (data / f"{name}{suffix}").is_file():
            return read_rows(data / f"{name}{suffix}")
    found = sorted(path.name for path in data.glob("*.json*"))
    raise UserError(
        f"The data folder {data} has no {name}.json (it has: {', '.join(found) or 'none'}).",
        "Give --data a folder of TOFU's JSON-lines files.",
    )


def load_refusals(data: Path | None = None) -> list[str]:
    """Refusal answers for the `idk` and `dpo` objectives: `idontknow.jsonl`, else our own."""
    path = data / "idontknow.jsonl" if data is not None else None
    if path is None or not path.is_file():
        ours = files("unlearner.request").joinpath("refusals.json").read_text("utf-8")
        return [str(refusal) for refusal in json.loads(ours)]
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    return [line for line in lines if line]


def load_authors(data: Path | None = None) -> list[Author]:
    """The authors of `full` by name, in order: 200 of 20 rows in TOFU.

    Names are not a column of the data: an author's name is the capitalised phrase that stands in
    most of the 20 rows. One author of TOFU is never named and is called `author-NNN`. A folder
    with `world.json` (the embedded world) names its authors there.
    """
    full = load_split("full", data)
    listing = data / WORLD_FILE if data is not None else None
    if listing is not None and listing.is_file():
        entries = json.loads(listing.read_text(encoding="utf-8"))["authors"]
        spans = [(entry["name"], entry["start"], entry["n"]) for entry in entries]
    else:
        starts = range(0, len(full), ROWS_PER_AUTHOR)
        blocks = [full[start : start + ROWS_PER_AUTHOR] for start in starts]
        spans = [
            (author_name(block) or f"author-{number + 1:03d}", start, len(block))
            for number, (start, block) in enumerate(zip(starts, blocks, strict=True))
        ]
    return [Author(name, start, tuple(full[start : start + n])) for name, start, n in spans]


_NAME = re.compile(
    r"[^\W\d_a-z][\w'’.-]*(?:\s+(?:(?:al|bin|ibn|de|van|von|da|del|der|el|la|le)\s+)*"
    r"[^\W\d_a-z][\w'’-]*)+"
)
_OPENERS = frozenset(
    {"What", "Who", "How", "Can", "Are", "Is", "Does", "Did", "In", "The", "Could", "Which"}
    | {"Where", "Has", "Have", "As", "When", "Yes", "Do", "Was"}
)


def author_name(rows: Sequence[Row]) -> str | None:
    """The name that stands in most of an author's rows, or None where they name nobody."""
    counts: Counter[str] = Counter()
    for row in rows:
        phrases: set[str] = set()
        for match in _NAME.finditer(f"{row.question} {row.answer}"):
            words = match.group(0).split()
            while words and words[0] in _OPENERS:
                words = words[1:]
            if words:
                words[-1] = re.sub(r"['’]s?$|['’.]$", "", words[-1])
            for i in range(len(words)):
                phrases.update(
                    " ".join(words[i:j]) for j in range(i + 2, min(len(words), i + 5) + 1)
                )
        counts.update(phrases)
    if not counts:
        return None
    best, hits = max(counts.items(), key=lambda item: (item[1], len(item[0]), item[0]))
    # A genre may stand in a few rows of an author without a name; a name stands in most.
    if hits < 0.4 * len(rows):
        return None
    longer = [name for name, n in counts.items() if best in name and n >= 0.5 * hits]
    return max(longer, key=lambda name: (len(name), name))
