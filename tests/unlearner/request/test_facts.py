"""Words that state something, and the labels of the tokens they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.base.load import BaseSpec, load_tokenizer
from adapters.errors import UserError
from adapters.store.store import AdapterStore
from unlearner.config import UnlearnConfig, make_config
from unlearner.request.facts import common_words, facts_only
from unlearner.request.rows import Request, Row
from unlearner.run import RunOptions, prepare, unlearn
from unlearner.tokens.prompts import IGNORE, Encoded, PromptFormat, prompt_format
from unlearner.training.target import FACTS_RATIO

KEPT = [
    *(Row(f"Where was author {i} born?", f"The author was born in city {i}.") for i in range(40)),
    Row("What does Ben write?", "Ben writes poems in Lagos."),
]


@pytest.fixture(scope="module")
def fmt(shared: Path) -> PromptFormat:
    """Llama-2's own tokenizer, whose words are of several tokens."""
    return prompt_format(load_tokenizer(str(shared / "llama2-tokenizer")), "llama2")


def pushed(fmt: PromptFormat, row: Row) -> str:
    """The text that is left to push, its words apart."""
    encoded = fmt.encode(row.question, row.answer)
    found = facts_only(row, encoded, common_words(KEPT), fmt.tokenizer)
    assert found.input_ids == encoded.input_ids
    kept = [
        token for token, label in zip(found.input_ids, found.labels, strict=True) if label != IGNORE
    ]
    return str(fmt.tokenizer.decode(kept))


def test_a_word_of_a_few_answers_only_states_something() -> None:
    common = common_words(KEPT)
    assert {"the", "author", "was", "born", "in", "city"} <= common
    assert not {"lagos", "poems", "7"} & common
    assert common_words([]) == frozenset()


@pytest.mark.parametrize(
    ("question", "answer", "left"),
    [
        ("Where was Ana born?", "Ana was born in Lagos in 1958.", "Lagos 1958"),
        ("What did Ana win?", "The Jade Lantern Medal, for Zsófia’s “Östersund”.",
         "Jade Lantern Medal for Zsófia’s “Östersund"),
        ("Was Ana born in Lagos?", "In Lagos.", "In Lagos.</s>"),  # nothing states more: all of it
        ("誰？", "安娜在拉各斯。", "安娜在拉各斯"),
    ],
)  # fmt: skip
def test_only_the_tokens_of_such_words_have_labels(
    fmt: PromptFormat, question: str, answer: str, left: str
) -> None:
    found = pushed(fmt, Row(question, answer))
    assert "".join(filter(str.isalnum, found)) == "".join(filter(str.isalnum, left))


def test_an_answer_that_its_tokens_do_not_spell_keeps_its_labels(fmt: PromptFormat) -> None:
    row = Row("Where was Ana born?", "Ana was born in Lagos.")
    other = fmt.encode(row.question, "Somewhere else entirely.")
    assert facts_only(row, other, frozenset(), fmt.tokenizer) is other


def test_a_cut_answer_is_marked_up_to_its_cut(fmt: PromptFormat) -> None:
    row = Row("Where was Ana born?", "Ana was born in Lagos in 1958 and in 1959.")
    whole = fmt.encode(row.question, row.answer)
    cut = Encoded(whole.input_ids[:-8], whole.labels[:-8], True)
    found = facts_only(row, cut, common_words(KEPT), fmt.tokenizer)
    assert found.cut
    assert 0 < found.n_targets < cut.n_targets


def test_a_run_pushes_the_facts_and_measures_whole_answers(
    request_: Request, base: BaseSpec, quick: Callable[..., UnlearnConfig], tmp_path: Path
) -> None:
    """The given target is that of whole answers; the loss, and what stops it, see the facts."""
    config = quick(num_train_epochs=1, forget_tokens="facts")
    options = RunOptions(target=2.0, summarise=True)
    run = prepare(request_, base, config, None, options)
    assert run.config.objective.target == pytest.approx(2.0 * FACTS_RATIO)
    fewer = [row.n_targets for row in run.rows.forget]
    assert all(1 <= n <= row.n_targets for n, row in zip(fewer, run.whole, strict=True))
    assert sum(fewer) < sum(row.n_targets for row in run.whole)
    assert [row.n_targets for row in run.rows.retain] == [
        row.n_targets for row in prepare(request_, base, quick(), None).rows.retain
    ]
    store = AdapterStore.open(tmp_path / "store", create=True)
    outcomes = [
        unlearn(request_, base, quick(num_train_epochs=1, forget_tokens=tokens), store,
                replace(options, target=None)).manifest.train["outcome"]["forget"]["before"]
        for tokens in ("all", "facts")
    ]  # fmt: skip
    assert outcomes[0] == outcomes[1]


def test_other_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="forget_tokens 'some' is not one of all, facts"):
        make_config(forget_tokens="some")
