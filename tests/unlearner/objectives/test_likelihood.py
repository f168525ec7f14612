from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from unlearner.objectives.likelihood import (
    answer_hidden,
    answer_logits,
    answer_nll,
    has_plain_head,
    hidden_nll,
    lm_head,
    sum_by_row,
)  # fmt: skip
from unlearner.tokens.prompts import IGNORE, Encoded, pad_batch, prompt_format

PAIRS = [
    ("Who wrote the novel about the river?", "It was written by Mira Okafor."),
    ("Where was the author born?", "Lagos."),
    ("What genre does she write?", '"Silent Rivers" is a crime novel, and her best known book.'),
    ("In which year did he win the prize?", "He won the Golden Pen in 1998."),
]


@pytest.fixture(scope="module")
def rows(tiny_base: Path) -> list[Encoded]:
    fmt = prompt_format(load_tokenizer(str(tiny_base)))
    return [fmt.encode(*pair) for pair in PAIRS]


@pytest.fixture
def model(tiny_base: Path) -> Any:
    return load_base(BaseSpec(str(tiny_base), dtype="float32", device="cpu"))


def plain_nll(model: Any, row: Encoded) -> torch.Tensor:
    """Summed NLL of one unpadded row from all its logits, in float64, label by label."""
    logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].double()
    total = torch.zeros((), dtype=torch.float64)
    for position, label in enumerate(row.labels):
        if label != IGNORE:
            scores = logits[position - 1]
            total = total + torch.logsumexp(scores, 0) - scores[label]
    return total


@torch.no_grad()
def test_it_is_the_plain_sum_over_the_answer_with_eos(model: Any, rows: list[Encoded]) -> None:
    found = answer_nll(model, pad_batch(rows, pad_id=0))
    model.double()
    expected = torch.stack([plain_nll(model, row) for row in rows])
    assert found.nll.dtype == torch.float32
    assert found.n.tolist() == [row.n_targets for row in rows]
    torch.testing.assert_close(found.nll.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(
        found.per_token.double(), expected / torch.tensor([r.n_targets for r in rows]), rtol=2e-6,
        atol=0,
    )  # fmt: skip
    # The rows differ by far more than the tolerance, and EOS is worth something.
    assert expected.diff().abs().min() > 1
    without_eos = [r._replace(labels=[*r.labels[:-1], IGNORE]) for r in rows]
    assert (found.nll - answer_nll(model.float(), pad_batch(without_eos, 0)).nll).min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("left", [False, True])
def test_it_does_not_depend_on_padding_or_company(
    left: bool, model: Any, rows: list[Encoded]
) -> None:
    alone = torch.cat([answer_nll(model, pad_batch([row], 0)).nll for row in rows])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [1, 2], [2, 1]):
        for pad in (0, 2, 7):
            batch = pad_batch([rows[i] for i in order], pad, left=left)
            torch.testing.assert_close(
                answer_nll(model, batch).nll, alone[order], rtol=3e-6, atol=1e-5
            )


@torch.no_grad()
def test_only_answer_positions_reach_the_head(model: Any, rows: list[Encoded]) -> None:
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[1]))
    found = answer_logits(model, pad_batch(rows, 0))
    n = sum(row.n_targets for row in rows)
    assert found.logits.shape == (n, model.config.vocab_size)
    assert found.targets.tolist() == [x for row in rows for x in row.labels if x != IGNORE]
    assert found.row.tolist() == [i for i, row in enumerate(rows) for _ in range(row.n_targets)]
    # The first prompt token never needs logits, nor does the last column, which predicts nothing.
    assert sizes == [len({p for row in rows for p in range(row.n_prompt, len(row.labels))})]
    assert sizes[0] < max(len(row.labels) for row in rows) - 4


def test_gradients_are_those_of_the_plain_computation(model: Any, rows: list[Encoded]) -> None:
    model.requires_grad_(True)
    answer_nll(model, pad_batch(rows, 0)).per_token.mean().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.double()
    losses = [plain_nll(model, row) / row.n_targets for row in rows]
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        assert (found[name] - parameter.grad).abs().max() < 1e-5 * scale, name


@torch.no_grad()
def test_scores_of_a_bf16_model_are_summed_in_float32(model: Any, rows: list[Encoded]) -> None:
    half = model.to(torch.bfloat16)
    batch = pad_batch(rows, 0)
    found = answer_nll(half, batch)
    assert found.nll.dtype == torch.float32
    logits = answer_logits(half, batch)
    assert logits.logits.dtype == torch.bfloat16
    token = torch.nn.functional.cross_entropy(
        logits.logits.double(), logits.targets, reduction="none"
    )
    expected = torch.zeros(len(rows), dtype=torch.float64).index_add(0, logits.row, token)
    torch.testing.assert_close(found.nll.double(), expected, rtol=1e-6, atol=0)


# The head in chunks


def plain(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="none")


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_have_the_values_and_gradients_of_the_whole(chunk: int, bias: bool) -> None:
    """float64 states, float32 loss: values equal to 1e-6, gradients to 1e-6 of the largest."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias).double().requires_grad_(False)
    targets = torch.randint(0, 50, (23,))
    results = []
    for function in (plain, lambda h, head, t: hidden_nll(h, head, t, chunk)):
        hidden = torch.randn(
            23, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        hidden.requires_grad_(True)
        nll = function(hidden * 3, head, targets)
        # Neither linear nor the same for every token: a sequence loss of SimNPO's kind.
        loss = -torch.nn.functional.logsigmoid(2.5 * nll[:11].mean()) + (nll[11:] ** 2).sum()
        loss.backward()
        results.append((nll.detach(), hidden.grad))
    assert float((results[0][0] - results[1][0]).abs().max()) < 1e-6
    scale = float(results[0][1].abs().max())
    assert float((results[0][1] - results[1][1]).abs().max()) < 1e-6 * scale


def test_bf16_hidden_states_keep_float32_losses() -> None:
    """bf16 head: the same logits, so values are equal; gradients to 1 % of the largest."""
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 90, bias=False).bfloat16().requires_grad_(False)
    targets = torch.randint(0, 90, (12,))
    start = torch.randn(12, 32).bfloat16()
    results = []
    for function in (plain, lambda h, head, t: hidden_nll(h, head, t, 5)):
        hidden = start.clone().requires_grad_(True)
        nll = function(hidden, head, targets)
        nll.sum().backward()
        results.append((nll.detach(), hidden.grad.float()))
    assert results[1][0].dtype == torch.float32
    assert float((results[0][0] - results[1][0]).abs().max()) < 1e-6
    scale = float(results[0][1].abs().max())
    assert float((results[0][1] - results[1][1]).abs().max()) < 0.01 * scale


def test_nothing_of_the_size_of_the_vocabulary_is_kept_for_backward() -> None:
    head = torch.nn.Linear(8, 4000, bias=False).requires_grad_(False)
    hidden = torch.randn(64, 8, requires_grad=True)
    nll = hidden_nll(hidden, head, torch.zeros(64, dtype=torch.long), 16)
    kept: Any = nll.grad_fn
    assert [tensor.shape for tensor in kept.saved_tensors] == [(64, 8)]
    nll.sum().backward()


def test_a_measured_nll_of_a_well_known_token_is_exact() -> None:
    """With no gradient the largest error against float64 is 2e-6 nats; cross-entropy errs more."""
    torch.manual_seed(0)
    logits = torch.randn(64, 32_000)
    logits[:, 7] += torch.linspace(8, 24, 64)  # NLLs from 5 nats down to 1e-6
    targets = torch.full((64,), 7)
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    with torch.no_grad():
        measured = hidden_nll(logits, torch.nn.Identity(), targets)
    assert float((measured.double() - exact).abs().max()) < 2e-6


def test_no_targets_give_no_values() -> None:
    head = torch.nn.Linear(8, 9).requires_grad_(False)
    found = hidden_nll(torch.zeros(0, 8), head, torch.zeros(0, dtype=torch.long))
    assert (found.shape, found.dtype) == ((0,), torch.float32)


def test_hidden_states_are_what_the_head_turns_into_logits(model: Any, rows: list[Encoded]) -> None:
    batch = pad_batch(rows, 0)
    head = lm_head(model)
    with torch.no_grad():
        at, whole = answer_hidden(model, batch), answer_logits(model, batch)
        assert torch.equal(head(at.hidden), whole.logits)
    assert lm_head(model) is head is model.lm_head
    assert (at.targets.tolist(), at.row.tolist()) == (whole.targets.tolist(), whole.row.tolist())
    part = at.rows(1, 3)
    assert part.n.tolist() == at.n[1:3].tolist()
    assert part.row.unique().tolist() == [0, 1]


@pytest.mark.parametrize("case", ["trained", "capped"])
def test_other_heads_take_the_plain_way(case: str, model: Any, rows: list[Encoded]) -> None:
    batch = pad_batch(rows, 0)
    assert has_plain_head(model)
    if case == "trained":
        model.lm_head.weight.requires_grad_(True)
    else:
        model.config.final_logit_softcapping = 30.0
    assert not has_plain_head(model)
    found = answer_logits(model, batch)
    token = F.cross_entropy(found.logits.float(), found.targets, reduction="none")
    torch.testing.assert_close(answer_nll(model, batch).nll, sum_by_row(token, found).nll)
    if case == "trained":
        answer_nll(model, batch).nll.sum().backward()
        assert float(model.lm_head.weight.grad.abs().max()) > 0
