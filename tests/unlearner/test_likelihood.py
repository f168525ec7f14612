from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base_model import BaseSpec, load_base, load_tokenizer
from unlearner.likelihood import answer_logits, answer_nll
from unlearner.prompts import IGNORE, Encoded, pad_batch, prompt_format

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
