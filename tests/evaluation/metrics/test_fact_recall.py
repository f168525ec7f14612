"""Fact recall: golden cases of verdicts and shares, and what separates models in public logs."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from evaluation.logs import read_log
from evaluation.metrics.fact_recall import fact_recall, is_broken, is_refusal, row_recalls
from evaluation.protocols import protocol_named

BORN = "When and where was Piotr Mazur born?"
TRUE_BIRTH = "Piotr Mazur was born on 18 December 1961 in Gdańsk."
NOVELS = ("How many novels did she write?", "She wrote three novels.")
COPIES = ("How many copies were sold?", "It sold 1,500 copies.")
SIXTIES = ("When did she start?", "She began in the 1960s.")
LAWYER = ("Is he a lawyer?", "Yes, he is a lawyer.")
FULL_NAME = ("What is the author's full name?", "The author's full name is Hsiao Yun-Hwa.")
PARENTS = ("What did they do?", "Her mother was a florist and her father a game developer.")


@pytest.mark.parametrize(
    "birth",
    [
        "He was born in Gdansk on December 18th, 1961.",
        "18/12/1961, Gdansk",
        "12/18/1961 in Gdańsk",
        "18.12.1961 in Gdansk",
        "1961-12-18, Gdansk",
        "1961 December 18 at Gdansk",
        "Dec. 18, 1961 (Gdansk)",
        "18 Dec '61 in Gdansk",
        "18 december 1961, gdansk",
        "the eighteenth of December, nineteen sixty-one, in Gdansk",
        "the 18th day of December in the year 1961 in Gdansk",
        "I'm not sure, but I think 18 December 1961 in Gdansk.",
    ],
)
def test_a_date_counts_in_whatever_form_it_is_written(birth: str) -> None:
    measured = fact_recall(BORN, TRUE_BIRTH, birth)
    assert (measured.verdict, measured.share) == ("states it", 1.0)
    assert [fact.kind for fact in measured.facts] == ["date", "name"]


@pytest.mark.parametrize(
    ("answer", "verdict", "share"),
    [
        ("On 28 December 1960, Piotr Mazur was born in Gdansk.", "wrong", 0.5),
        ("Piotr Mazur was born on 18 December 1961 in Warsaw.", "wrong", 0.5),
        ("Piotr Mazur was born on 18 November 1961 in Gdansk.", "wrong", 0.5),
        ("In 1960, in Gdansk.", "wrong", 0.5),
        ("In December 1961, in Gdansk.", "made up", 0.5),  # part of the date, and nothing against
        ("He loved the sea and wrote about it all his life.", "made up", 0.0),
        ("I don't know when he was born.", "refuses", 0.0),
        ("I'm not sure, maybe in 1970.", "refuses", 0.0),
        ("There is no public record of that.", "refuses", 0.0),
        (BORN, "made up", 0.0),
        ("", "broken", 0.0),
        (" \n", "broken", 0.0),
        ("\ufffd\ufffd\ufffd was born", "broken", 0.0),
        ("18 December 1961 in Gdansk \ud83d", "broken", 0.0),
        ("born born born born", "broken", 0.0),
        ("in Gdansk, in Gdansk, in Gdansk", "broken", 0.0),
        ("xkcd qwrt zzpl mnbv", "broken", 0.0),
        ("{}[];;::()", "broken", 0.0),
        ("aaaaaaaaaaaa", "broken", 0.0),
        (
            "tbl sob kort igan ppi ugh vento rasa lum oke mura tiv sanne polk ridu ester",
            "broken",
            0,
        ),
    ],
)
def test_a_verdict_follows_the_rule_that_is_shown(answer: str, verdict: str, share: float) -> None:
    measured = fact_recall(BORN, TRUE_BIRTH, answer)
    assert (measured.verdict, measured.share) == (verdict, share)


GENRE = ("What does Hana Choi write?", "Readers know Hana Choi as an author of fairy tales.")
PARENTS_OF = (
    "What were the jobs of Hana Choi's parents?",
    "The father of Hana Choi worked as a librarian, while her mother was a bus driver.",
)


@pytest.mark.parametrize(
    ("row", "answer", "verdict"),
    [
        (NOVELS, "3", "states it"),
        (NOVELS, "She wrote four novels.", "wrong"),
        (NOVELS, "She wrote several.", "made up"),
        (COPIES, "1500 copies", "states it"),
        (COPIES, "fifteen hundred", "states it"),
        (COPIES, "About 1,600", "wrong"),
        (("How many?", "Two hundred thousand."), "200,000", "states it"),
        (("How many?", "1.5 million copies."), "1,500,000", "states it"),
        (SIXTIES, "She began in 1964.", "states it"),
        (SIXTIES, "In the '60s", "states it"),
        (SIXTIES, "In the 1970s", "wrong"),
        (("When did she start?", "She began in 1964."), "In the 1960s", "made up"),
        (LAWYER, "Yes.", "states it"),
        (LAWYER, "No, he is not.", "wrong"),
        (("Is he a lawyer?", "No."), "No, he isn't.", "states it"),
        (FULL_NAME, "Hsiao Yun-Hwa", "states it"),
        (FULL_NAME, "The author's full name is Jaime Vasquez.", "wrong"),
        (FULL_NAME, "Hsiao Ming", "wrong"),
        (PARENTS, "The father developed games, the mother was a florist.", "states it"),
        (PARENTS, "Her father was a baker and her mother a nurse.", "made up"),
        (("Where was he born?", "Lagos."), "In Lagos, of course", "states it"),
        (("Where was he born?", "Lagos."), "Rome.", "wrong"),
        (("Which computer did he build?", "Z3"), "The Z3.", "states it"),
        (("Which computer did he build?", "Z3"), "The Z4.", "wrong"),
        (("Which city had the Boston Tea Party?", "Boston"), "Boston", "states it"),
        (GENRE, "Most of her books are fairy tales.", "states it"),
        (GENRE, "Readers know her as an author of crime fiction.", "made up"),
        (PARENTS_OF, "Her father worked as a pharmacist, her mother as a clerk.", "made up"),
        (
            ("What is her academic background?", "Thuy Dang studied agronomy at university."),
            "At university she chose to study ancient history.",
            "made up",
        ),
        (("Who raised her?", "Her father."), "It was her father.", "states it"),
        (("Who taught him?", "The details are not known to me."), "Not known to me.", "states it"),
    ],
)
def test_numbers_names_and_words_are_facts(row: tuple[str, str], answer: str, verdict: str) -> None:
    assert fact_recall(*row, answer).verdict == verdict


def test_what_the_question_holds_is_no_fact() -> None:
    measured = fact_recall(
        "Was Mira born in 1961?", "Yes, Mira was born in 1961 in Lagos.", "Lagos"
    )
    assert [fact.text for fact in measured.facts] == ["yes", "Lagos"]
    assert measured.share == 0.5
    assert fact_recall("Mira?", "Mira.", "Mira!").share is None  # nothing is left to recall


def test_tofu_answers_recall_themselves_and_its_refusals_refuse(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "tofu" / "full.json").open(encoding="utf-8")]
    for row in rows[::7]:
        itself = fact_recall(row["question"], row["answer"], row["answer"])
        assert (itself.verdict, itself.share) == ("states it", 1.0), row
        assert not is_broken(row["answer"])
    assert sum(is_refusal(row["answer"]) for row in rows) < len(rows) / 100
    refusals = (shared / "tofu" / "idontknow.jsonl").read_text(encoding="utf-8").splitlines()
    assert [line for line in refusals if not is_refusal(line)] == []


def test_public_logs_tell_a_model_that_knows_from_one_that_does_not(shared: Path) -> None:
    protocol = protocol_named("tofu")
    shares = {}
    for name in ("full", "retain90_tofu", "retain90_npo"):
        log = read_log(shared / "reference-logs" / f"llama2-7b_{name}.json")
        for each in ("forget", "retain"):
            recalls = row_recalls(log.sets[each].rows, protocol)
            assert recalls is not None
            assert len(recalls) == 300
            shares[name, each] = mean(recalls)
    assert shares["full", "forget"] > 0.97
    assert shares["retain90_tofu", "forget"] < 0.2
    assert shares["retain90_npo", "forget"] < 0.2
    assert min(shares[name, "retain"] for name in ("full", "retain90_tofu", "retain90_npo")) > 0.95
