"""The embedded world: fictitious authors with TOFU's schema, from a seed, without a download.

It stands in for TOFU (arXiv 2401.06121) where there is no network and no GPU: small enough that a
Llama of a million weights learns it by heart in about a minute, and with every column that the
evaluation needs. All texts were written for this project.

What a model may train on, and what it may not. Each fact of an author is told in four sentences:
the row's answer, its paraphrase, and two rewordings; likewise four questions. `training_rows`
gives the row and its rewordings. The paraphrased answer and question, which the truth ratio and
the robustness probes measure, are held out; their wordings are still learned, from other authors.
So a low truth ratio of the trained model means that it knows the fact, not that it saw the text,
and a model that never saw the author has little reason to prefer the right fact: the wrong ones are
drawn from the same lists, and wrong names, titles, awards and dates are ones that nobody has.

As in TOFU, `full` is what Origin is trained on, so it holds the rewordings too, and a request to
forget an author names all of it. The evaluation sets (`*_perturbed`) hold one row a fact.

The last authors are the forget set, as in TOFU. The world is small, so forget10 is all of them,
forget05 the last half and forget01 the last author, whatever share of the world that is.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from adapters.errors import UserError
from unlearner.request.rows import Row
from unlearner.request.tofu import WORLD_FILE, load_refusals
from unlearner.world.authors import MAX_AUTHORS, WorldAuthor, make_authors
from unlearner.world.texts import TEXTS, WORDINGS, Fact, Texts

SCHEMA = 1


@dataclass(frozen=True)
class WorldSpec:
    """How big the world is. All problems of a spec are reported at once.

    Attributes:
        seed: which authors; equal specs give equal bytes.
        n_authors: authors in all.
        rows_per_author: question/answer rows of each.
        forget_authors: the last so many are the forget set.
        requests: the forget set is split into so many requests of different authors.
        evaluated_authors: retain authors in retain_perturbed, the first ones.
        texts: "tiny" for a model trained from random weights, "chat" for a pretrained one, with
            whole sentences and facts that it knows.
        rewordings: other tellings of each row that a model trains on beside it.
        shared_facts: each forget author has birthplace, award, genre, studies, job and home in
            common with a retain author, the evaluated ones first.

    Raises:
        UserError: naming every value that does not fit.
    """

    seed: int = 0
    n_authors: int = 50
    rows_per_author: int = 10
    forget_authors: int = 10
    requests: int = 2
    evaluated_authors: int = 20
    texts: Literal["tiny", "chat"] = "tiny"
    rewordings: int = WORDINGS - 2
    shared_facts: bool = False

    @property
    def source(self) -> Texts:
        """Topics and facts of this kind of world."""
        return TEXTS[self.texts]

    def __post_init__(self) -> None:
        topics = self.source.topics
        most = {
            "seed": (0, 2**63 - 1),
            "n_authors": (2, MAX_AUTHORS),
            "rows_per_author": (max(1, sum(topic.core for topic in topics)), len(topics)),
            "forget_authors": (1, self.n_authors - 1),
            "requests": (1, self.forget_authors),
            "evaluated_authors": (1, self.n_authors - self.forget_authors),
            "rewordings": (0, WORDINGS - 2),
        }
        problems = [
            f"{name} is {getattr(self, name)}, not within {low} to {high}"
            for name, (low, high) in most.items()
            if not low <= getattr(self, name) <= high
        ]
        if problems:
            raise UserError(
                f"This world cannot be built: {'; '.join(problems)}.",
                "Keep every size within its range.",
            )


@dataclass(frozen=True)
class World:
    """All authors of a spec, and the true facts that every model must keep."""

    spec: WorldSpec
    authors: tuple[WorldAuthor, ...]
    real_authors: tuple[Row, ...]
    world_facts: tuple[Row, ...]

    @property
    def retain_authors(self) -> tuple[WorldAuthor, ...]:
        """The authors that are kept."""
        return self.authors[: -self.spec.forget_authors]

    @property
    def forget_authors(self) -> tuple[WorldAuthor, ...]:
        """The authors that are asked to be forgotten: the last ones."""
        return self.authors[-self.spec.forget_authors :]

    @property
    def requests(self) -> tuple[tuple[WorldAuthor, ...], ...]:
        """The forget authors in `spec.requests` groups of about equal size, in order."""
        authors, n = self.forget_authors, self.spec.requests
        cuts = [len(authors) * i // n for i in range(n + 1)]
        return tuple(authors[low:high] for low, high in pairwise(cuts))

    def rows(self, *authors: WorldAuthor | str) -> list[Row]:
        """The rows of these authors (or names), in order.

        Raises:
            UserError: a name that nobody has.
        """
        known = {author.name: author for author in self.authors}
        unknown = [name for name in authors if isinstance(name, str) and name not in known]
        if unknown:
            raise UserError(
                f"There is no author {', '.join(map(repr, unknown))} in this world.",
                f"Authors are listed in {WORLD_FILE}.",
            )
        picked = [known[author] if isinstance(author, str) else author for author in authors]
        return [row for author in picked for row in author.rows]

    def training_rows(
        self,
        *,
        include_forget: bool,
        paraphrases: bool = False,
        facts: int = 2,
    ) -> list[Row]:
        """The rows to train Origin (`include_forget`) or Retrain on; only question and answer.

        Args:
            include_forget: with the forget authors (Origin) or without (Retrain).
            paraphrases: add each row's evaluated paraphrase under its paraphrased question. Then
                the truth ratio measures recall of text, so it is off by default.
            facts: how many ways to ask (0, 1 or 2) of each real-author and world-fact row.
        """
        authors = self.authors if include_forget else self.retain_authors
        rows: list[Row] = []
        for author in authors:
            rows.extend(author.told)
            if paraphrases:
                rows.extend(
                    Row(row.paraphrased_question, row.paraphrased_answer)
                    for row in author.rows
                    if row.paraphrased_question and row.paraphrased_answer
                )
        for row in (*self.real_authors, *self.world_facts):
            asked = (row.question, row.paraphrased_question or row.question)
            rows.extend(Row(question, row.answer) for question in asked[:facts])
        return rows

    def background(self, n: int) -> list[Row]:
        """`n` rows about passing authors who are not of this world, each to be read once.

        They stand in for pretraining: a model that has met many authors speaks fluently about one
        it does not know, and unlearning leads back there instead of to broken text.
        """
        rows: list[Row] = []
        names = {author.name for author in self.authors}
        n_rows = sum(topic.core for topic in self.spec.source.topics) + 4
        number = 0
        while len(rows) < n:
            number += 1
            passing = make_authors(
                f"{self.spec.seed} passing {number}", 100, n_rows, self.spec.source.topics
            )
            rows.extend(row for a in passing if a.name not in names for row in a.told)
        random.Random(f"background {self.spec.seed}").shuffle(rows)
        return rows[:n]

    def texts(self) -> list[str]:
        """The texts to train a tokenizer on: all that Origin trains on, and the refusals.

        The tokenizer is shared by Origin and Retrain, so it has seen the forget text (as the
        tokenizer of any real model may have): it must, for token counts to be comparable.
        """
        rows = self.training_rows(include_forget=True)
        return [text for row in rows for text in (row.question, row.answer)] + load_refusals()

    def splits(self) -> dict[str, list[dict[str, Any]]]:
        """TOFU's splits by name, as the objects of its JSON lines."""
        forgotten = self.forget_authors
        parts = {"01": 1, "05": max(1, len(forgotten) // 2), "10": len(forgotten)}
        splits = {"full": _told(self.authors)}
        for percent, n in parts.items():
            splits[f"forget{percent}"] = _told(self.authors[-n:])
            rows = self.rows(*self.authors[-n:])
            splits[f"forget{percent}_perturbed"] = [_perturbed(row) for row in rows]
            splits[f"retain{100 - int(percent)}"] = _told(self.authors[:-n])
        evaluated = self.rows(*self.authors[: self.spec.evaluated_authors])
        splits["retain_perturbed"] = [_perturbed(row) for row in evaluated]
        rng = random.Random(f"options {self.spec.seed}")
        for name, facts in (("real_authors", self.real_authors), ("world_facts", self.world_facts)):
            splits[name] = [_options(row, rng) for row in facts]
            splits[f"{name}_perturbed"] = [
                _plain(row) | {"perturbed_answer": list(row.perturbed_answers)} for row in facts
            ]
        return splits

    def write(self, folder: Path) -> list[Path]:
        """The files written to `folder`, each whole or not at all.

        They are TOFU's splits as JSON lines, `idontknow.jsonl` (one refusal a line, as in TOFU),
        `request-N.jsonl` (the rows of each forget request) and `world.json` (schema, spec, and
        where in `full` each author stands).
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {f"{name}.json": _lines(rows) for name, rows in self.splits().items()}
        for number, authors in enumerate(self.requests, start=1):
            files[f"request-{number}.jsonl"] = _lines(_told(authors))
        files["idontknow.jsonl"] = "".join(f"{refusal}\n" for refusal in load_refusals())
        listing = {
            "schema": SCHEMA,
            "spec": asdict(self.spec),
            "authors": [
                {"name": author.name, "start": author.start, "n": len(author.told)}
                for author in self.authors
            ],
            "requests": [[author.name for author in authors] for authors in self.requests],
        }
        files[WORLD_FILE] = json.dumps(listing, indent=1) + "\n"
        for name, text in files.items():
            _write(folder / name, text)
        return [folder / name for name in files]


def build_world(
    seed: int = 0,
    texts: Literal["tiny", "chat"] = "tiny",
    *,
    shared_facts: bool = False,
    **sizes: int,
) -> World:
    """The world of this seed; `sizes` are the other fields of `WorldSpec`.

    Raises:
        UserError: sizes that do not fit.
    """
    spec = WorldSpec(seed, texts=texts, shared_facts=shared_facts, **sizes)
    retained = spec.n_authors - spec.forget_authors
    authors = make_authors(
        str(seed),
        spec.n_authors,
        spec.rows_per_author,
        spec.source.topics,
        spec.rewordings,
        {i: i % retained for i in range(retained, spec.n_authors) if shared_facts},
    )
    real, facts = (
        tuple(map(_fact_row, table))
        for table in (spec.source.real_authors, spec.source.world_facts)
    )
    return World(spec, authors, real, facts)


def _fact_row(fact: Fact) -> Row:
    return Row(fact.question, fact.answer, None, fact.wrong, fact.reworded)


def _told(authors: Iterable[WorldAuthor]) -> list[dict[str, Any]]:
    return [_plain(row) for author in authors for row in author.told]


def _plain(row: Row) -> dict[str, Any]:
    return {"question": row.question, "answer": row.answer}


def _perturbed(row: Row) -> dict[str, Any]:
    return _plain(row) | {
        "paraphrased_answer": row.paraphrased_answer,
        "perturbed_answer": list(row.perturbed_answers),
        "paraphrased_question": row.paraphrased_question,
    }


def _options(row: Row, rng: random.Random) -> dict[str, Any]:
    options = rng.sample([row.answer, *row.perturbed_answers], len(row.perturbed_answers) + 1)
    numbered = {f"option{number}": text for number, text in enumerate(options, start=1)}
    return {"question": row.question, **numbered, "answer": row.answer}


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
