"""Trees score what rows score: on real questions, real tokens, with adapters and in half."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.base.load import load_tokenizer
from adapters.errors import UserError
from evaluation.inference import prefix_sharing as prefix_tree
from evaluation.inference import scoring
from evaluation.inference.prefix_sharing import (
    ancestors,
    build_tree,
    packs_of,
    score_trees,
    sharing_problem,
)
from evaluation.inference.scoring import encode_answers, score_rows
from unlearner.request.rows import Row
from unlearner.request.tofu import load_split
from unlearner.tokens.prompts import IGNORE, Encoded, prompt_format


def llama(**shape: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 32000, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def fmt(shared: Path) -> Any:
    return prompt_format(load_tokenizer(str(shared / "llama2-tokenizer")))


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[Row]:
    """Real questions with seven answers, some of which open with a quote, and short ones."""
    found = load_split("forget05_perturbed", shared / "tofu")
    quoted = [r for r in found if any(t.startswith('"') for t in (r.answer, *r.perturbed_answers))]
    return [*quoted[:1], *found[:2], *load_split("world_facts_perturbed", shared / "tofu")[:1]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", [200, 40])
def test_trees_and_rows_give_the_same_scores(
    attention: str, max_length: int, fmt: Any, rows: list[Row]
) -> None:
    """Largest difference 1e-5 nats per token of up to 20, grouped heads, cut rows included."""
    model = llama(attn_implementation=attention)
    plain = score_rows(model, fmt, rows, shared=False, max_length=max_length)
    tree = score_rows(model, fmt, rows, shared=True, max_length=max_length)
    gap = 0.0
    for a, b in zip(plain, tree, strict=True):
        for x, y in zip(texts_of(a), texts_of(b), strict=True):
            assert x.n == y.n
            gap = max(gap, abs(x.mean_nll - y.mean_nll))
    assert 0 < gap < 1e-5


def texts_of(record: Any) -> list[Any]:
    """All scores of a row."""
    return [record.answer_score, record.paraphrase, *record.perturbed]


def test_bf16_differs_by_its_rounding_only(fmt: Any, rows: list[Row]) -> None:
    """bf16: largest difference 0.1 nats per token of up to 20."""
    model = llama().bfloat16()
    plain, tree = (score_rows(model, fmt, rows[:1], shared=s) for s in (False, True))
    for a, b in zip(plain, tree, strict=True):
        for x, y in zip(texts_of(a), texts_of(b), strict=True):
            assert abs(x.mean_nll - y.mean_nll) < 0.1


def test_an_active_adapter_is_in_the_tree(fmt: Any, rows: list[Row]) -> None:
    from peft import LoraConfig

    from adapters.lora.peft_layers import wrap

    bare = score_rows(llama(), fmt, rows[:3])
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = wrap(llama(), "a", lora)
    plain, tree = (score_rows(model, fmt, rows[:3], shared=s) for s in (False, True))
    for a, b, c in zip(plain, tree, bare, strict=True):
        for x, y, z in zip(texts_of(a), texts_of(b), texts_of(c), strict=True):
            assert abs(x.mean_nll - y.mean_nll) < 1e-5
            assert abs(x.mean_nll - z.mean_nll) > 1e-4


def test_the_way_that_was_taken(fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("score_trees", "_score_texts"):
        real = getattr(scoring, name)
        monkeypatch.setattr(
            scoring, name, lambda *a, _r=real, _n=name, **k: taken.append(_n) or _r(*a, **k)
        )
    score_rows(llama(), fmt, rows[:1])
    score_rows(llama(), fmt, rows[:1], shared=False)
    monkeypatch.setattr(scoring, "sharing_problem", lambda model, questions: "it differs")
    score_rows(llama(), fmt, rows[:1])
    score_rows(llama(), fmt, rows[:1], checked=True)
    assert taken == ["score_trees", "_score_texts", "_score_texts", "score_trees"]


def questions_of(fmt: Any, rows: list[Row]) -> list[list[Encoded]]:
    return [list(row.texts) for row in encode_answers(fmt, rows)]


@torch.no_grad()
def test_trees_that_differ_are_noticed(
    fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, model = questions_of(fmt, rows), llama()
    assert sharing_problem(model, questions) is None
    # As if every token saw all before it, those of other answers too.
    with monkeypatch.context() as patch:
        patch.setattr(
            prefix_tree, "ancestors", lambda p: torch.ones(len(p), len(p)).tril().bool().numpy()
        )
        problem = sharing_problem(model, questions)
        assert problem is not None
        assert "nats per token" in problem
        assert sharing_problem(model.bfloat16(), questions) is not None


@torch.no_grad()
def test_one_long_text_beyond_a_sliding_window_is_noticed(fmt: Any) -> None:
    """The first questions are short: only the longest shows that a tree ignores the window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32000, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=48,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(4.0)
    short = [Row(f"Who is {i}?", "Ana.", None, ("Mira.",)) for i in range(6)]
    assert sharing_problem(model, questions_of(fmt, short)) is None
    long = Row("Who wrote it?", "It was Mira Okafor of Lagos. " * 8, None, ("Ana.",))
    assert sharing_problem(model, questions_of(fmt, [*short, long])) is not None


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_half_precision_may_round_but_not_shift_all_texts(
    fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Errors of .02 nats either way pass, one and the same .02 in every text does not."""
    model, questions = llama().bfloat16(), questions_of(fmt, rows)
    real = prefix_tree._score_pack

    def moved(model: Any, texts: Any) -> Any:
        scores = real(model, texts)
        signs = [1 if shift or i % 2 else -1 for i in range(len(scores))]
        return [
            s._replace(nll=s.nll + 0.02 * sign * max(s.nll, s.n))
            for s, sign in zip(scores, signs, strict=True)
        ]

    def exact(model: Any, batch: Any) -> Any:
        """Rows of their own as the tree has them: the model's rounding is left out."""
        rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        texts = [Encoded(i[: m.sum()].tolist(), y[: m.sum()].tolist()) for i, y, m in rows]
        nlls = [score.nll / score.n for score in real(model, texts)]
        return SimpleNamespace(per_token=torch.tensor(nlls))

    monkeypatch.setattr(prefix_tree, "answer_nll", exact)
    monkeypatch.setattr(prefix_tree, "_score_pack", moved)
    assert (sharing_problem(model, questions) is None) == (shift == 0.0)


@torch.no_grad()
def test_kernels_that_take_no_mask_are_replaced_for_trees(fmt: Any, rows: list[Row]) -> None:
    """Flash-attention takes no mask: its model scores trees by sdpa, and keeps its kernel."""
    questions = questions_of(fmt, rows)
    model = llama()
    expected = score_trees(model, questions)
    model.config._attn_implementation = "flash_attention_2"
    assert score_trees(model, questions) == expected
    assert model.config._attn_implementation == "flash_attention_2"


@torch.no_grad()
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUDA error: device-side assert"), UserError),
        (TypeError("no argument position_ids"), None),
    ],
)
def test_a_failing_tree_never_takes_the_slow_way_in_silence(
    fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch, error: Exception, raised: Any
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(prefix_tree, "forward_tree", fail)
    if raised is None:
        assert "no argument position_ids" in str(sharing_problem(llama(), questions_of(fmt, rows)))
        return
    with pytest.raises(raised, match=str(error)):
        sharing_problem(llama(), questions_of(fmt, rows))


@torch.no_grad()
def test_a_problem_of_one_process_is_a_problem_of_all(
    fmt: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    votes: list[bool] = []
    monkeypatch.setattr(prefix_tree.distributed, "any_of", lambda flag: votes.append(flag) or True)
    assert "another process" in str(sharing_problem(llama(), questions_of(fmt, rows)))
    assert votes == [False]
    sharing_problem(llama(), [])
    assert votes == [False, False], "a process without rows votes too"


def test_a_tree_by_hand() -> None:
    texts = [
        Encoded([1, 2, 3, 9], [IGNORE, IGNORE, 3, 9]),
        Encoded([1, 2, 4, 9], [IGNORE, IGNORE, 4, 9]),
        Encoded([1, 2, 3, 9], [IGNORE, IGNORE, 3, 9]),
        Encoded([1, 5], [IGNORE, 5]),
    ]
    tree = build_tree(texts)
    # 1 -> 2 -> 3 and 4; nothing follows 9 or 5.
    assert (tree.tokens, tree.parents, tree.depths) == ([1, 2, 3, 4], [-1, 0, 1, 1], [0, 1, 2, 2])
    assert tree.leaves == [[(1, 3), (2, 9)], [(1, 4), (3, 9)], [(1, 3), (2, 9)], [(0, 5)]]
    assert ancestors(tree.parents).tolist() == [
        [True, False, False, False], [True, True, False, False],
        [True, True, True, False], [True, True, False, True],
    ]  # fmt: skip


def test_what_all_questions_begin_with_is_computed_once_per_pack(fmt: Any) -> None:
    system = list(range(100, 150))
    texts = [
        [Encoded([*system, i, k, 2], [*[IGNORE] * 51, k, 2]) for k in (5, 6)] for i in range(60, 80)
    ]
    # 50 tokens of all, and of each question itself and the two answers.
    assert list(map(len, packs_of(texts, 50 + 3 * 10))) == [10, 10]
    assert len(build_tree([text for question in texts for text in question]).tokens) == 50 + 3 * 20
    model = llama()
    with torch.no_grad():
        together, alone = score_trees(model, texts), [score_trees(model, [q])[0] for q in texts]
    for a, b in zip(together, alone, strict=True):
        assert [s.nll for s in a] == pytest.approx([s.nll for s in b], abs=1e-4)


def test_packs_keep_the_order_and_the_scores(fmt: Any, rows: list[Row]) -> None:
    model = llama()
    questions = [list(row.texts) for row in encode_answers(fmt, rows)]
    with torch.no_grad():
        seen: list[tuple[int, int]] = []
        one = score_trees(model, questions, tokens=1, on_progress=lambda a, b: seen.append((a, b)))
        many = score_trees(model, questions, tokens=4000)
    assert seen[-1] == (sum(map(len, questions)),) * 2
    assert len(seen) == len(questions)
    for a, b in zip(one, many, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.n == y.n
            assert x.nll == pytest.approx(y.nll, rel=1e-6)


def test_a_tree_holds_every_beginning_of_its_texts_once(fmt: Any, rows: list[Row]) -> None:
    for row in encode_answers(fmt, rows):
        ids = [tuple(text.input_ids) for text in row.texts]
        assert len(build_tree(row.texts).tokens) == len(
            {text[:end] for text in ids for end in range(1, len(text))}
        )


@pytest.mark.slow
def test_distinct_tokens_of_the_real_set_are_as_counted(shared: Path, fmt: Any) -> None:
    """Counted once by other code over all four sets: 143,622."""
    total = nodes = 0
    for name, limit in (("forget05", 200), ("retain", 300), ("real_authors", 100),
                        ("world_facts", 117)):  # fmt: skip
        found = load_split(f"{name}_perturbed", shared / "tofu")[:limit]
        for row in encode_answers(fmt, found):
            total += sum(len(text.input_ids) for text in row.texts)
            nodes += len(build_tree(row.texts).tokens)
    assert total / nodes > 1.85
    assert nodes == 143_622
