"""`unlearner preview` on real rows and the real Llama-2 tokenizer: exactly what is trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ui.preview import CLOSE, DIM, OPEN, UNDERLINE, split_text
from unlearner.tokens.prompts import Encoded

BOS, EOS, MASK = 1, 2, -100


@pytest.fixture(scope="module")
def tokenizer_only(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer's files and nothing else: no config.json, no weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shared / "llama2-tokenizer" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def llama2(tokenizer_only: Path) -> Any:
    """The tokenizer itself, loaded without our loader."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer_only / "tokenizer.json"))


def test_forget05_is_what_the_specification_says(
    run: Any, shared: Path, tokenizer_only: Path, llama2: Any
) -> None:
    ran = run(
        "preview", "tofu:forget05", "--base", tokenizer_only, "--data", shared / "tofu", "--json"
    )
    assert ran.code == 0
    table = ran.json["table"]
    lines = (shared / "tofu" / "forget05.json").read_text(encoding="utf-8").splitlines()
    source = [json.loads(line) for line in lines]
    assert len(table) == len(source) == 200
    assert len({row["name"] for row in table}) == 200
    for row, raw in zip(table, source, strict=True):
        assert (row["question"], row["answer"]) == (raw["question"], raw["answer"])
        prompt = llama2.encode(f"[INST] {raw['question']} [/INST]").ids
        whole = llama2.encode(f"[INST] {raw['question']} [/INST]{raw['answer']}").ids
        assert row["input_ids"] == [*whole, EOS]
        assert row["input_ids"][0] == BOS
        n = len(prompt)
        assert row["labels"] == [MASK] * n + row["input_ids"][n:]
        assert row["n_prompt"] == n
        assert row["n_targets"] == len(row["input_ids"]) - n


def test_no_space_follows_the_prompt(run: Any, tokenizer_only: Path, tmp_path: Path) -> None:
    """`[/INST]The`, not `[/INST] The`: the ids are written down from the reference tokenizer."""
    request = tmp_path / "rows.jsonl"
    request.write_text('{"question": "Who?", "answer": "The author."}\n')
    ran = run("preview", request, "--base", tokenizer_only, "--json")
    (row,) = ran.json["table"]
    # <s> ▁[ INST ] ▁Who ? ▁[ / INST ] | The ▁author . </s>
    assert row["input_ids"] == [1, 518, 25580, 29962, 11644, 29973, 518, 29914, 25580, 29962,
                                1576, 4148, 29889, 2]  # fmt: skip
    assert row["labels"] == [MASK] * 10 + [1576, 4148, 29889, 2]


def test_a_quote_that_merges_with_the_prompt_is_masked_with_it(
    run: Any, shared: Path, tokenizer_only: Path
) -> None:
    """`]"` is one token: the prompt's count masks it, as in TOFU; 8 rows of forget05 have it."""
    ran = run(
        "preview", "tofu:forget05", "--base", tokenizer_only, "--data", shared / "tofu", "--json"
    )
    merged = [row for row in ran.json["table"] if row["input_ids"][row["n_prompt"] - 1] != 29962]
    assert len(merged) == 8
    assert all(row["answer"].startswith('"') for row in merged)


def test_max_length_cuts_and_takes_eos_away(run: Any, shared: Path, tokenizer_only: Path) -> None:
    words = [
        "preview",
        "tofu:forget05",
        "--base",
        tokenizer_only,
        "--data",
        shared / "tofu",
        "--json",
    ]
    whole, cut = run(*words).json, run(*words, "--max-length", "60").json
    assert whole["n_cut"] == 0
    longer = [row for row in whole["table"] if len(row["input_ids"]) > 60]
    assert cut["n_cut"] == len(longer) > 0
    for before, after in zip(whole["table"], cut["table"], strict=True):
        assert after["input_ids"] == before["input_ids"][:60]
        assert after["labels"] == before["labels"][:60]


def test_rows_that_lose_their_whole_answer_are_pointed_out(
    run: Any, shared: Path, tokenizer_only: Path
) -> None:
    ran = run(
        "preview", "tofu:forget05", "--base", tokenizer_only, "--data", shared / "tofu",
        "--max-length", "16",
    )  # fmt: skip
    assert ran.code == 0
    assert "no answer token is left in forget-1" in ran.err


def test_text_brackets_the_loss_tokens_off_a_terminal(
    run: Any, shared: Path, tokenizer_only: Path
) -> None:
    ran = run(
        "preview", "tofu:author=Hina Ameen", "--base", tokenizer_only, "--data", shared / "tofu",
        "--rows", "2",
    )  # fmt: skip
    assert ran.code == 0
    assert ran.out.count(OPEN) == ran.out.count(CLOSE) == 2
    assert "[/INST]⟦The author's name is Hina Ameen.</s>⟧" in ran.out
    assert "forget: 20 rows" in ran.out
    assert "\x1b" not in ran.out


def test_text_dims_and_underlines_on_a_terminal(
    run: Any, shared: Path, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ui.console import Console

    monkeypatch.setattr(Console, "styled", True)
    ran = run(
        "preview", "tofu:forget01", "--base", tokenizer_only, "--data", shared / "tofu",
        "--rows", "1",
    )  # fmt: skip
    line = next(line for line in ran.out.splitlines() if DIM in line)
    assert line.index(DIM) < line.index("[INST]") < line.index(UNDERLINE)
    assert OPEN not in line


def test_retain_rows_are_shown_when_they_are_named(
    run: Any, shared: Path, tokenizer_only: Path
) -> None:
    ran = run(
        "preview", "tofu:forget01", "--retain", "tofu:forget05", "--base", tokenizer_only,
        "--data", shared / "tofu", "--json",
    )  # fmt: skip
    assert ran.code == 2
    assert "is also row" in ran.err  # forget01 is the end of forget05
    ran = run(
        "preview", "tofu:forget01", "--retain", "tofu:real_authors", "--base", tokenizer_only,
        "--data", shared / "tofu", "--json",
    )  # fmt: skip
    assert (ran.json["n_forget"], ran.json["n_retain"]) == (40, 100)
    assert ran.json["table"][40]["name"] == "retain-1"


def test_a_chat_template_is_used_and_can_be_overruled(
    run: Any, tiny_base: Path, tmp_path: Path
) -> None:
    request = tmp_path / "rows.jsonl"
    request.write_text('{"question": "Who?", "answer": "Mira."}\n')
    chat = run("preview", request, "--base", tiny_base)
    plain = run("preview", request, "--base", tiny_base, "--template", "llama2")
    assert "template chat" in chat.out
    assert "[/INST]⟦ Mira.</s>⟧" in chat.out  # its template has a space there
    assert "template llama2" in plain.out
    assert "[/INST]⟦Mira.</s>⟧" in plain.out


def test_the_split_keeps_every_character_of_the_row(tiny_base: Path) -> None:
    """A character whose bytes the mask divides is still shown on both sides."""
    from adapters.base.load import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_base))
    ids = [1, *tokenizer("naïve", add_special_tokens=False)["input_ids"], 2]
    for n in range(1, len(ids)):
        prompt, targets = split_text(Encoded(ids, [MASK] * n + ids[n:]), tokenizer)
        assert prompt.startswith("<s>")
        assert targets.endswith("</s>")


@pytest.mark.parametrize(
    ("request_text", "problem", "fix"),
    [
        ("tofu:forget5", "'tofu:forget5' is not a request", "'forget05'"),
        ("tofu:author=Hina Amen", "no author 'Hina Amen'", "'Hina Ameen'"),
        ("tofu:author=", "no author ''", "Fix: "),
        ("nowhere.jsonl", "nowhere.jsonl does not exist", "file of rows"),
    ],
)
def test_a_request_that_does_not_exist(
    request_text: str, problem: str, fix: str, run: Any, shared: Path, tokenizer_only: Path
) -> None:
    ran = run(
        "preview", request_text, "--base", tokenizer_only, "--data", shared / "tofu", "--json"
    )
    assert ran.code == 2
    assert ran.out == ""
    assert problem in ran.err
    assert fix in ran.err


def test_a_broken_request_names_every_problem(
    run: Any, tokenizer_only: Path, tmp_path: Path
) -> None:
    request = tmp_path / "broken.jsonl"
    request.write_text(
        '{"question": "Who?", "answer": "Mira."}\n'
        '{"question": "Who?"}\n'
        "{nonsense\n"
        '{"question": "", "answer": "x"}\n'
        '{"question": "Who?", "answer": "Mira."}\n'
        '["a list"]\n'
    )
    ran = run("preview", request, "--base", tokenizer_only)
    assert ran.code == 2
    assert "has 5 problems" in ran.err
    for place in ("line 2: no 'answer'", "line 3: broken JSON", "line 4: 'question' is empty",
                  "line 5: the same row as line 1", "line 6: not a JSON object"):  # fmt: skip
        assert place in ran.err


@pytest.mark.parametrize("base", ["./no-such-folder", "../up/and/away", "/nowhere/at/all"])
def test_a_base_that_does_not_exist(base: str, run: Any, shared: Path) -> None:
    ran = run("preview", "tofu:forget01", "--base", base, "--data", shared / "tofu")
    assert ran.code == 2
    assert "neither a folder nor a hub id" in ran.err


def test_a_data_folder_that_does_not_exist(run: Any, tokenizer_only: Path, tmp_path: Path) -> None:
    ran = run("preview", "tofu:forget01", "--base", tokenizer_only, "--data", tmp_path / "none")
    assert ran.code == 2
    assert "does not exist" in ran.err
    assert "--data" in ran.err


def test_the_data_folder_may_come_from_the_environment(
    run: Any, shared: Path, tokenizer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNLEARNER_DATA", str(shared / "tofu"))
    assert run("preview", "tofu:forget01", "--base", tokenizer_only).code == 0


def test_an_inserted_system_prompt_is_shown_set_and_removed(
    run: Any, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<system>You help on {{ strftime_now('%Y-%m-%d') }}."
        "</s>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    request = tmp_path / "rows.csv"
    request.write_text("q,a\nWho?,Mira.\n", encoding="utf-8")
    words = ["preview", request, "--base", tmp_path / "base", "--question-column", "q"]
    words += ["--answer-column", "a"]
    shown = run(*words)
    assert "You help on 2024-07-26." in shown.out
    assert "date: 2024-07-26" in shown.out
    made = run(*words, "--json", "--max-length", "30").json
    assert "You help on 2024-07-26." in made["preamble"]
    assert (made["date"], made["n_cut"]) == ("2024-07-26", 1)
    assert "system prompt: <system>Be brief." in run(*words, "--system", "Be brief.").out
    assert "help" not in run(*words, "--system", "none").out
