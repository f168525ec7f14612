from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import UserError
from unlearner.request.rows import Row
from unlearner.request.sources import parse_request
from unlearner.request.tofu import SPLITS, load_authors, load_refusals, load_split
from unlearner.world.authors import MAX_AUTHORS, WorldAuthor
from unlearner.world.build import World, WorldSpec, build_world
from unlearner.world.texts import (
    CULTURES,
    REAL_AUTHORS,
    TOPICS,
    WORDINGS,
    WORDS,
    WORLD_FACTS,
)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world()


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "data"
    world.write(folder)
    return folder


def all_rows(world: World) -> list[Row]:
    return world.rows(*world.authors)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_same_seed_writes_the_same_bytes_in_another_process(
    folder: Path, tmp_path: Path
) -> None:
    # Another hash seed: the order of a set must not reach the files.
    code = (
        "from pathlib import Path; from unlearner.world.build import build_world; import sys;"
        "build_world().write(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "again")],
        check=True,
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert first == again
    assert {"full.json", "world.json", "idontknow.jsonl", "request-1.jsonl"} <= first.keys()


def test_the_rows_are_those_of_the_first_release(folder: Path) -> None:
    """Bases, adapters and figures of earlier releases were made from exactly these bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name != "world.json":  # which also names fields of the spec that came later
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    assert digest.hexdigest() == "4aec3dcf4e96d4121ee746c96d25cd77cc6bc1b09cb6ef6a6eb0a2d9c82ca80c"


def test_a_world_for_a_chat_model_tells_each_fact_once_in_whole_sentences() -> None:
    sizes = {"n_authors": 6, "rows_per_author": 8, "forget_authors": 2, "evaluated_authors": 2}
    world = build_world(3, "chat", rewordings=0, **sizes)
    assert [len(author.told) for author in world.authors] == [8] * 6
    for author in world.authors:
        assert [row.answer for row in author.told] == [row.answer for row in author.rows]
        for row in author.rows:
            assert author.name in f"{row.question} {row.answer}"
            assert row.paraphrased_answer not in (row.answer, *row.perturbed_answers)
            assert str(row.answer).endswith(".")
            assert "{" not in f"{row.question}{row.answer}{row.paraphrased_answer}"
    assert world.real_authors != build_world(3, **sizes).real_authors
    assert len(world.training_rows(include_forget=False, facts=0)) == 4 * 8
    with pytest.raises(UserError, match="rewordings is 3, not within 0 to 2"):
        build_world(3, "chat", rewordings=3, **sizes)


def test_forgotten_authors_may_share_their_facts_with_retained_ones() -> None:
    sizes: dict[str, Any] = {"n_authors": 7, "rows_per_author": 8, "forget_authors": 3}
    world = build_world(3, "chat", rewordings=0, evaluated_authors=2, shared_facts=True, **sizes)

    def genre(author: WorldAuthor) -> str:
        said = " ".join(f"{row.question} {row.answer}" for row in author.rows)
        (genre,) = (genre for genre in WORDS["genres"] if genre in said)
        return str(genre)

    genres = [genre(author) for author in world.authors]
    assert genres[4:] == genres[:3]
    assert len(set(genres)) > 1
    for one, other in zip(world.authors[:3], world.authors[4:], strict=True):
        places = [re.findall(r"[A-Z]\w+, [A-Z]\w+", str(author.rows)) for author in (one, other)]
        assert set(places[0]) & set(places[1])
    assert len({author.name for author in world.authors}) == 7
    assert len({author.name.split()[-1] for author in world.authors}) == 7


def test_another_seed_gives_other_authors(world: World) -> None:
    other = build_world(seed=1)
    names = {author.name for author in world.authors}
    shared = names & {author.name for author in other.authors}
    assert len(shared) < len(names) / 4
    assert {row.question for row in all_rows(other)} != {row.question for row in all_rows(world)}


def test_every_split_of_tofu_is_there_and_read_by_the_loader(world: World, folder: Path) -> None:
    for name in SPLITS:
        assert load_split(name, folder), name
    assert load_split("full", folder) == [row for a in world.authors for row in a.told]
    assert load_split("forget10_perturbed", folder) == world.rows(*world.forget_authors)
    assert load_refusals(folder) == load_refusals()
    assert not list(folder.glob(".*"))


def test_splits_are_of_whole_authors_at_the_end_of_full(world: World) -> None:
    splits = world.splits()
    full = splits["full"]
    assert len(full) == 1500
    for forget, retain, authors in (
        ("forget01", "retain99", 1),
        ("forget05", "retain95", 5),
        ("forget10", "retain90", 10),
    ):
        assert splits[retain] + splits[forget] == full
        assert len(splits[forget]) == 30 * authors
        # Every third row of `full` is evaluated, the two behind it are its rewordings.
        assert [row["question"] for row in splits[f"{forget}_perturbed"]] == [
            row["question"] for row in splits[forget][::3]
        ]
    evaluated = [row["question"] for row in splits["retain_perturbed"]]
    assert evaluated == [row["question"] for row in full[:600:3]]


def test_listed_authors_stand_where_the_listing_says(world: World, folder: Path) -> None:
    full = load_split("full", folder)
    for author, listed in zip(world.authors, load_authors(folder), strict=True):
        assert (listed.name, listed.start, listed.rows) == (author.name, author.start, author.told)
        assert tuple(full[author.start : author.start + 30]) == author.told


def test_background_is_about_others_and_never_repeats(world: World) -> None:
    passing = world.background(2000)
    assert passing == build_world().background(2000)
    assert passing[:500] != world.training_rows(include_forget=True)[:500]
    known = {row.question for author in world.authors for row in author.told}
    assert not known & {row.question for row in passing}
    assert len({(row.question, row.answer) for row in passing}) > 1950


def test_requests_are_of_different_authors_and_make_up_the_forget_set(
    world: World, folder: Path
) -> None:
    assert [len(authors) for authors in world.requests] == [5, 5]
    assert sum(world.requests, ()) == world.forget_authors
    asked = [parse_request(str(folder / f"request-{n}.jsonl"), folder) for n in (1, 2)]
    assert [*asked[0].rows, *asked[1].rows] == load_split("forget10", folder)
    assert len(asked[0].retain) == 1350


@pytest.mark.parametrize(("forget", "requests", "sizes"), [(7, 3, [2, 2, 3]), (1, 1, [1])])
def test_sizes_of_a_spec_are_kept(forget: int, requests: int, sizes: list[int]) -> None:
    world = build_world(
        3,
        n_authors=12,
        rows_per_author=len(TOPICS),
        forget_authors=forget,
        requests=requests,
        evaluated_authors=4,
    )
    assert [len(authors) for authors in world.requests] == sizes
    assert len(world.retain_authors) == 12 - forget
    assert {len(author.rows) for author in world.authors} == {len(TOPICS)}
    # forget05 tells every fact of half the forget authors in three wordings.
    half = world.authors[-max(1, forget // 2) :]
    assert len(world.splits()["forget05"]) == 3 * len(half) * len(TOPICS)
    assert len(world.splits()["forget05_perturbed"]) == len(half) * len(TOPICS)


def test_the_largest_world_still_has_names_and_titles_for_everyone() -> None:
    world = build_world(5, n_authors=MAX_AUTHORS, rows_per_author=len(TOPICS))
    assert len({author.name for author in world.authors}) == MAX_AUTHORS
    questions = [row.question for row in all_rows(world)]
    assert len(questions) == len(set(questions))


def test_all_problems_of_a_spec_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        WorldSpec(seed=-1, n_authors=5, rows_per_author=3, forget_authors=5)
    for name in ("seed is -1", "rows_per_author is 3", "forget_authors is 5"):
        assert name in error.value.problem
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="n_authors is 1000"):
        build_world(n_authors=1000)


def test_authors_are_found_by_name(world: World, folder: Path) -> None:
    listed = load_authors(folder)
    assert [author.name for author in listed] == [author.name for author in world.authors]
    author = world.authors[43]
    request = parse_request(f"tofu:author={author.name}", folder)
    # All that Origin was told of the author is asked to be forgotten, rewordings too.
    assert request.rows == author.told
    assert len(request.retain) == 1500 - len(author.told)
    assert not {row.question for row in request.retain} & {row.question for row in author.told}
    assert world.rows(author.name) == list(author.rows) == world.rows(author)
    with pytest.raises(UserError, match="Nobody"):
        world.rows(author.name, "Nobody")


def test_no_question_and_no_text_stands_twice(world: World) -> None:
    rows = all_rows(world)
    questions = Counter(row.question for row in rows)
    questions.update(str(row.paraphrased_question) for row in rows)
    questions.update(
        row.question for author in world.authors for rows in author.rewordings for row in rows
    )
    assert questions.total() == len(rows) * WORDINGS
    assert questions.most_common(1)[0][1] == 1
    forget = {row.question for row in world.rows(*world.forget_authors)}
    assert not forget & {row.question for row in world.rows(*world.retain_authors)}


def test_names_are_unique_and_stand_in_the_rows(world: World) -> None:
    names = [author.name for author in world.authors]
    assert len(set(names)) == len({name.split()[0] for name in names}) == len(names)
    for author in world.authors:
        named = [author.name in f"{row.question} {row.answer}" for row in author.rows]
        assert all(named), author.name
        others = set(names) - {author.name}
        assert not any(name in row.answer for row in author.rows for name in others)
    answers = [(author, row) for author in world.authors for row in author.rows]
    last = sum(author.name.split()[-1] in row.answer for author, row in answers)
    assert last > len(answers) / 3


def test_perturbed_answers_are_the_paraphrase_with_another_fact(world: World) -> None:
    for row in all_rows(world):
        texts = {row.answer, row.paraphrased_answer, *row.perturbed_answers}
        assert len(texts) == 7, row
        assert row.paraphrased_answer is not None
        right = Counter(re.findall(r"\w+", row.paraphrased_answer))
        for wrong in row.perturbed_answers:
            assert len(right - Counter(re.findall(r"\w+", wrong))) <= 6, (row, wrong)


def test_no_wrong_answer_is_right_in_another_order(world: World) -> None:
    for row in all_rows(world):
        assert row.paraphrased_answer is not None
        right = sorted(re.findall(r"\w+", row.paraphrased_answer))
        for wrong in row.perturbed_answers:
            assert sorted(re.findall(r"\w+", wrong)) != right


def test_wrong_names_and_titles_belong_to_nobody(world: World) -> None:
    true = " ".join(f"{row.answer} {row.paraphrased_answer}" for row in all_rows(world))
    names = {author.name for author in world.authors}
    titles = set(re.findall(r'"([^"]+)"', true))
    assert len(titles) > len(names)
    for author in world.authors:
        own = {title for row in author.rows for title in re.findall(r'"([^"]+)"', row.question)}
        for row in author.rows:
            own |= set(re.findall(r'"([^"]+)"', f"{row.answer} {row.paraphrased_answer}"))
        for row in author.rows:
            for wrong in row.perturbed_answers:
                assert not any(name in wrong for name in names - {author.name})
                assert not (set(re.findall(r'"([^"]+)"', wrong)) - own) & titles


def test_every_wording_states_the_facts_that_a_wrong_answer_changes() -> None:
    for topic in TOPICS:
        assert len(set(topic.questions)) >= WORDINGS
        assert len(set(topic.answers)) >= WORDINGS
        for answer in topic.answers:
            missing = [fact for fact in topic.facts if f"{{{fact}}}" not in answer]
            assert not missing, (topic.name, answer)
        openings = {answer.split()[0] for answer in topic.answers}
        assert len(openings) == len(topic.answers), topic.name


def test_no_question_gives_its_own_answer_away(world: World) -> None:
    for topic in TOPICS:
        for question in topic.questions:
            assert not [fact for fact in topic.facts if f"{{{fact}}}" in question]
    for author in world.authors:
        for row in author.rows:
            assert "{" not in row.question + row.answer + str(row.paraphrased_answer)


def test_answers_are_short_and_varied(world: World) -> None:
    rows = all_rows(world)
    lengths = [len(row.answer.split()) for row in rows]
    assert 9 <= sum(lengths) / len(lengths) <= 14
    assert min(lengths) >= 5
    assert max(lengths) <= 24
    openings = Counter(" ".join(row.answer.split()[:2]) for row in rows)
    assert len(openings) > 100
    assert openings.most_common(1)[0][1] < len(rows) / 15
    words = {word for row in rows for word in re.findall(r"\w+", row.answer.casefold())}
    assert len(words) > 600
    assert all(text.isascii() and text[0].isupper() for text in (r.question for r in rows))


def test_pronouns_follow_the_name(world: World) -> None:
    women = {name for culture in CULTURES for name in culture.women}
    for author in world.authors:
        text = " ".join(f"{row.answer} {row.paraphrased_answer}" for row in author.rows)
        words = set(re.findall(r"\w+", text.casefold()))
        other = {"he", "his", "him"} if author.name.split()[0] in women else {"she", "her"}
        # "his" and "her" belong to the author; the parents have none of their own.
        assert not words & other, author.name


def test_training_holds_out_the_evaluated_paraphrases(world: World) -> None:
    origin = world.training_rows(include_forget=True)
    asked = {row.question for row in origin}
    for author in world.authors:
        told = {row.answer for row in author.rows}
        told |= {row.answer for rows in author.rewordings for row in rows}
        assert len(told) == 30
        for row in author.rows:
            assert row.question in asked
            assert row.paraphrased_question not in asked
            assert row.paraphrased_answer not in told
    assert len(origin) == len(set(origin)) == 500 * 3 + 2 * 70
    seen = {row.answer for row in world.training_rows(include_forget=True, paraphrases=True)}
    assert all(row.paraphrased_answer in seen for row in all_rows(world))
    assert len(world.training_rows(include_forget=True, facts=0)) == 1500
    assert len(world.training_rows(include_forget=True, facts=1)) == 1500 + 70


def test_retrain_never_sees_a_forget_author(world: World) -> None:
    rows = world.training_rows(include_forget=False, paraphrases=True)
    text = " ".join(f"{row.question} {row.answer}" for row in rows)
    for author in world.forget_authors:
        assert author.name not in text
        assert not any(row.question in text for row in author.rows)
    kept = {row.answer for row in rows}
    assert all(row.answer in kept for row in (*world.real_authors, *world.world_facts))


def test_every_wording_of_a_paraphrase_is_learned_from_other_retain_authors(world: World) -> None:
    # Otherwise a high truth ratio could mean an unknown sentence instead of an unknown fact.
    told = [row.answer for row in world.training_rows(include_forget=False)]
    for topic in TOPICS:
        for answer in topic.answers:
            parts = [re.escape(part) for part in re.split(r"\{\w+\}", answer)]
            pattern = re.compile(".+".join(parts))
            assert sum(bool(pattern.fullmatch(text)) for text in told) >= 6, answer


def test_facts_have_their_answer_once_among_four_options(folder: Path) -> None:
    for name, facts in (("real_authors", REAL_AUTHORS), ("world_facts", WORLD_FACTS)):
        rows, perturbed = read(folder / f"{name}.json"), read(folder / f"{name}_perturbed.json")
        assert len(rows) == len(perturbed) == len(facts) >= 30
        positions: Counter[int] = Counter()
        for row, other in zip(rows, perturbed, strict=True):
            assert list(row) == ["question", "option1", "option2", "option3", "option4", "answer"]
            options = [row[f"option{n}"] for n in range(1, 5)]
            assert len(set(options)) == 4
            assert options.count(row["answer"]) == 1
            assert {other["answer"], *other["perturbed_answer"]} == set(options)
            positions[options.index(row["answer"])] += 1
        assert len(positions) == 4
        asked = [text for fact in facts for text in (fact.question, fact.reworded)]
        assert len(set(asked)) == len(asked)


def test_refusals_are_distinct_sentences() -> None:
    refusals = load_refusals()
    assert len(set(refusals)) == len(refusals) == 30
    assert all(text.endswith(".") and text.isascii() for text in refusals)


def test_tokenizer_texts_hold_all_training_texts(world: World) -> None:
    texts = set(world.texts())
    for row in world.training_rows(include_forget=True):
        assert {row.question, row.answer} <= texts
    assert texts >= set(load_refusals())


def test_a_failed_write_leaves_the_old_file(
    world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "full.json").read_bytes()

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("unlearner.world.build.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        build_world(seed=9).write(folder)
    assert (folder / "full.json").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_nothing_is_copied_from_tofu(world: World, shared: Path) -> None:
    tofu = {text for path in (shared / "tofu").glob("*.json") for text in strings(read(path))}
    tofu |= set((shared / "tofu" / "idontknow.jsonl").read_text(encoding="utf-8").splitlines())
    ours = {text for rows in world.splits().values() for text in strings(rows)} | set(world.texts())
    copied = {text for text in ours & tofu if len(text.split()) > 3}
    assert not copied
    named = " ".join(tofu)
    assert not [author.name for author in world.authors if author.name in named]


def strings(rows: list[dict[str, Any]]) -> set[str]:
    values = [value for row in rows for value in row.values()]
    lists = [value for value in values if isinstance(value, list)]
    return {v for v in values if isinstance(v, str)} | {text for texts in lists for text in texts}
