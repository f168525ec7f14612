from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearner.config import ObjectiveConfig, default_objective, streams_of
from unlearner.objectives.likelihood import AnswerHidden, AnswerLogits, AnswerNLL
from unlearner.objectives.registry import OBJECTIVES, OPTION_FORMULAS
from unlearner.objectives.sequence import (
    AnswerTokens,
    Terms,
    dpo,
    kl_to_reference,
    npo,
    simnpo,
)

N = torch.tensor([5, 20])
NLL = {
    "forget": torch.tensor([10.0, 4.0]),
    "retain": torch.tensor([0.5, 6.0]),
    "refusal": torch.tensor([30.0, 40.0]),
}
REFERENCE = {
    "forget": torch.tensor([2.0, 4.0]),
    "retain": torch.tensor([0.25, 5.0]),
    "refusal": torch.tensor([36.0, 50.0]),
}
LOGITS = {
    "retain": torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [0.0, 0.0]]),
    "forget": torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]]).log() + 3.0,
}
REFERENCE_LOGITS = {
    "retain": torch.tensor([[0.0, math.log(4.0)], [0.0, 0.0], [1.0, 1.0]]),
    "forget": torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.3, 0.4], [0.25, 0.25, 0.5]]).log() - 1.0,
}
# Of width 1, where the steering vector is 1 whatever the seed.
STATES = {"forget": [[18.0], [20.0], [23.0]], "retain": [[1.0], [2.0], [3.0]]}
REFERENCE_STATES = {"retain": [[1.0], [4.0], [2.0]]}


class Given:
    """Forwards with numbers given by hand; writes down which were asked for."""

    seed = 5

    def __init__(self) -> None:
        self.asked: set[str] = set()

    def nll(self, stream: str) -> AnswerNLL:
        self.asked.add(stream)
        return AnswerNLL(NLL[stream], N)

    def reference_nll(self, stream: str) -> AnswerNLL:
        self.asked.add(stream)
        return AnswerNLL(REFERENCE[stream], N)

    def reference_kl(self, stream: str) -> Tensor:
        self.asked.add(stream)
        return kl_to_reference(positions(LOGITS[stream]), positions(REFERENCE_LOGITS[stream]))

    def tokens(self, stream: str, value: Any) -> AnswerTokens:
        self.asked.add(stream)
        return AnswerTokens(value(LOGITS[stream], TARGETS), AT)

    def tokens_and_reference(self, stream: str, value: Any) -> AnswerTokens:
        self.asked.add(stream)
        return AnswerTokens(value(LOGITS[stream], REFERENCE_LOGITS[stream], TARGETS), AT)

    def states(self, stream: str, layer: int) -> AnswerHidden:
        self.asked.add(stream)
        return AT._replace(hidden=torch.tensor(STATES[stream]))

    def reference_states(self, stream: str, layer: int) -> AnswerHidden:
        return AT._replace(hidden=torch.tensor(REFERENCE_STATES[stream]))


TARGETS = torch.tensor([0, 1, 2])
# Two tokens of row 0 and one of row 1.
AT = AnswerHidden(torch.zeros(3, 1), TARGETS, torch.tensor([0, 0, 1]), torch.tensor([2, 1]))


def positions(logits: Tensor) -> AnswerLogits:
    """Two targets of row 0 and one of row 1."""
    n = torch.tensor([2, 1])
    return AnswerLogits(logits, torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]), n)


def softplus(x: float) -> float:
    """log(1 + exp(x)) in float64: `-logsigmoid(-x)`, by another road."""
    return math.log1p(math.exp(x)) if x < 30 else x + math.exp(-x)


def lowered(teacher: tuple[float, ...], true: int, model: tuple[float, ...]) -> float:
    """UNDIAL's cross-entropy with beta 10, from probabilities."""
    weight = [q * (math.exp(-10) if i == true else 1) for i, q in enumerate(teacher)]
    return -sum(w * math.log(p) for w, p in zip(weight, model, strict=True)) / sum(weight)


# nbar = (2, .2); nll - ref = (8, 0); refusal - its ref = (-6, -10). Computed by hand from SPEC 2.
KL = [(0.5 * (0.2 * math.log(0.4) + 0.8 * math.log(1.6) - 0.5 * math.log(0.75))), 0.0]
GOLDEN: dict[str, tuple[list[float], list[float]]] = {
    # 0.8 * log(1 + e^-5), 0.8 * log(1 + e^-0.5)
    "simnpo": ([0.00537227879, 0.379261587], [0.1, 0.3]),
    "simnpo-readme": ([0.00537227879, 0.379261587], [0.1, 0.3]),
    # 20 * log(1 + e^-0.8), 20 * log 2
    "npo": ([7.42201332, 13.8629436], [0.1, 0.3]),
    "grad_ascent": ([-2.0, -0.2], [0.0, 0.0]),
    "grad_diff": ([-2.0, -0.2], [0.1, 0.3]),
    "kl": ([-2.0, -0.2], KL),
    "idk": ([6.0, 2.0], [0.1, 0.3]),
    # The margin is 6 + 8 = 14 and 10 + 0 = 10: 20 * log(1 + e^-1.4), 20 * log(1 + e^-1)
    "dpo": ([4.40834820, 6.26523374], [0.1, 0.3]),
    # (18 - 20)^2, 0; (23 - 20)^2. Retain: 0, (2 - 4)^2; (3 - 2)^2.
    "rmu": ([2.0, 9.0], [2.0, 1.0]),
    # The teacher without (nearly) the true token: (0, 1/2, 1/2), (3/7, 0, 4/7), (1/2, 1/2, 0).
    "undial": (
        [
            (
                lowered((0.8, 0.1, 0.1), 0, (0.5, 0.25, 0.25))
                + lowered((0.3, 0.3, 0.4), 1, (0.2, 0.6, 0.2))
            )
            / 2,
            lowered((0.25, 0.25, 0.5), 2, (0.1, 0.2, 0.7)),
        ],
        [0.0, 0.0],
    ),
    # -p ln(1/p) of .5 and .6; of .7
    "wga": (
        [-(0.5 * math.log(2) + 0.6 * math.log(5 / 3)) / 2, -0.7 * math.log(10 / 7)],
        [0.1, 0.3],
    ),
    # -p^5 (1 - p) ln(1/p)
    "satimp": (
        [
            -(0.5**6 * math.log(2) + 0.6**5 * 0.4 * math.log(5 / 3)) / 2,
            -(0.7**5) * 0.3 * math.log(10 / 7),
        ],
        [0.1, 0.3],
    ),
    # Without the first token of each answer: (1/2, 0, 1/2) against (.2, .6, .2); nothing is left.
    "ceu": ([math.log(5), 0.0], [0.0, 0.0]),
    # 1 + .5 - .25 and 1 + .6 - .2; 1 + .7 - .2
    "ihl": ([1.325, 1.5], [0.1, 0.3]),
}


def test_every_objective_has_a_case_defaults_and_streams() -> None:
    assert set(GOLDEN) == set(OBJECTIVES)
    assert all(default_objective(name).name == name for name in OBJECTIVES)
    assert all(objective.streams and objective.formula for objective in OBJECTIVES.values())
    assert set(OPTION_FORMULAS) == {
        *("alternates", "attack_weight", "general_weight", "protected_directions", "target")
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_an_objective_is_what_the_specification_says(name: str) -> None:
    given = Given()
    terms = OBJECTIVES[name].terms(given, default_objective(name))
    forget, retain = GOLDEN[name]
    torch.testing.assert_close(terms.forget, torch.tensor(forget), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(terms.retain, torch.tensor(retain), rtol=1e-6, atol=1e-7)
    # It reads no stream that the trainer does not put into the batch, and all that it does.
    assert given.asked == set(streams_of(default_objective(name)))


@pytest.mark.parametrize(
    "name", [name for name, objective in OBJECTIVES.items() if "retain" in objective.streams]
)
def test_a_retain_term_without_weight_is_not_computed(name: str) -> None:
    config = default_objective(name)
    for weight in (0.0, 0.5):
        given = Given()
        chosen = replace(config, retain_weight=weight)
        terms = OBJECTIVES[name].terms(given, chosen)
        assert given.asked == set(streams_of(chosen))
        assert ("retain" in given.asked) == (weight > 0)
        assert (terms.retain.abs().sum() > 0) == (weight > 0)
        forget = torch.tensor(GOLDEN[name][0])
        torch.testing.assert_close(terms.forget, forget, rtol=1e-6, atol=1e-7)


def test_the_card_weighs_the_retain_term_and_the_readme_the_forget_term() -> None:
    card, readme = default_objective("simnpo"), default_objective("simnpo-readme")
    assert (card.beta, card.gamma, card.forget_weight, card.retain_weight) == (2.5, 0, 1, 0.1375)
    assert (readme.forget_weight, readme.retain_weight) == (0.1375, 1.0)
    assert replace(readme, name="simnpo", forget_weight=1.0, retain_weight=0.1375) == card
    for gamma in (0.0, 0.7):
        one = OBJECTIVES["simnpo"].terms(Given(), replace(card, gamma=gamma))
        other = OBJECTIVES["simnpo-readme"].terms(Given(), replace(readme, gamma=gamma))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gamma_is_outside_beta_as_on_the_card() -> None:
    nll, n, beta = torch.tensor([10.0, 2.0, 7.0]), torch.tensor([5, 8, 7]), 2.5

    def released(gamma: float) -> Tensor:
        return -(2 / beta) * torch.nn.functional.logsigmoid(beta * (nll / n - gamma))

    torch.testing.assert_close(simnpo(nll, n, beta, 0.0), released(0.0), rtol=1e-6, atol=0)
    # The released code's gamma is ours divided by beta.
    torch.testing.assert_close(simnpo(nll, n, beta, 0.75), released(0.3), rtol=1e-6, atol=1e-8)
    assert (simnpo(nll, n, beta, 0.75) - released(0.75)).abs().min() > 1e-3


@pytest.mark.parametrize(("beta", "gamma"), [(2.5, 0.0), (2.5, 1.0), (0.1, 0.0), (4.5, 3.0)])
def test_simnpo_pulls_a_row_by_twice_the_sigmoid_over_its_length(beta: float, gamma: float) -> None:
    nll = torch.tensor([0.1, 3.0, 40.0, 120.0], requires_grad=True)
    n = torch.tensor([1, 5, 20, 30])
    simnpo(nll, n, beta, gamma).sum().backward()
    expected = [
        -2 / (1 + math.exp(beta * x / k - gamma)) / k
        for x, k in zip(nll.tolist(), n.tolist(), strict=True)
    ]
    torch.testing.assert_close(nll.grad, torch.tensor(expected), rtol=1e-5, atol=1e-12)


def test_npo_pulls_a_row_by_the_weight_of_its_paper() -> None:
    nll = torch.tensor([0.5, 30.0, 80.0], requires_grad=True)
    reference, beta = torch.tensor([0.5, 10.0, 90.0]), 0.1
    npo(nll, reference, beta).sum().backward()
    ours, before = torch.exp(-beta * nll.detach()), torch.exp(-beta * reference)
    # arXiv 2404.05868: W = 2 pi^beta / (pi^beta + pi_ref^beta) times gradient ascent's.
    torch.testing.assert_close(nll.grad, -2 * ours / (ours + before), rtol=1e-5, atol=0)


def test_npo_at_its_reference_is_two_log_two_over_beta_and_half_the_pull() -> None:
    nll = torch.tensor([0.0, 3.0, 400.0], requires_grad=True)
    for beta in (0.1, 2.5):
        loss = npo(nll, nll.detach(), beta)
        torch.testing.assert_close(loss, torch.full((3,), 2 * math.log(2) / beta))
    (grad,) = torch.autograd.grad(npo(nll, nll.detach(), 0.1).sum(), nll)
    torch.testing.assert_close(grad, torch.full((3,), -1.0))


@pytest.mark.parametrize("nats", [-1e3, -40.0, 0.0, 40.0, 1e3])
def test_extremes_stay_finite_and_exact(nats: float) -> None:
    x = torch.tensor([nats], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    losses = {
        "simnpo": (simnpo(x, one, 2.5, 0.0), 0.8 * softplus(-2.5 * nats)),
        "npo": (npo(x, zero, 0.1), 20 * softplus(-0.1 * nats)),
        "npo steep": (npo(x, zero, 2.5), 0.8 * softplus(-2.5 * nats)),
        # The same margin, once by the answer and once by the refusal.
        "dpo answer": (dpo(x, zero, zero, zero, 0.1), 20 * softplus(-0.1 * nats)),
        "dpo refusal": (dpo(zero, zero, x, zero, 0.1), 20 * softplus(0.1 * nats)),
    }
    for name, (loss, expected) in losses.items():
        assert math.isclose(loss.item(), expected, rel_tol=2e-6, abs_tol=1e-30), name
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isfinite(grad).all(), name
        # Minimising drives the answer's NLL up and the refusal's down, by at most 2 a nat.
        sign = 1 if name == "dpo refusal" else -1
        assert 0 <= sign * grad.item() <= 2, name


def test_kl_is_of_the_reference_from_the_model_by_row_mean() -> None:
    def at(probabilities: list[list[float]], shift: float = 0.0) -> AnswerLogits:
        return positions((torch.tensor(probabilities).log() + shift).requires_grad_())

    reference = at([[0.5, 0.5], [0.2, 0.8], [0.9, 0.1]])
    theta = at([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], shift=7.0)
    found = kl_to_reference(theta, reference)
    first = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    last = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    # Row 0 has two answer positions, the second without a difference.
    torch.testing.assert_close(found, torch.tensor([first / 2, last]), rtol=1e-5, atol=1e-7)
    assert kl_to_reference(theta, theta).abs().max() == 0
    (grad,) = torch.autograd.grad(found.sum(), theta.logits)
    torch.testing.assert_close(grad[2], torch.tensor([-0.4, 0.4]), rtol=1e-5, atol=1e-6)


def test_kl_of_extreme_logits_is_finite_and_in_float32() -> None:
    low = torch.tensor([[1e3, -1e3], [0.0, 0.0], [-1e3, 1e3]], dtype=torch.bfloat16)
    theta = positions(low.clone().requires_grad_())
    found = kl_to_reference(theta, positions(-low))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([1000.0, 2000.0]), rtol=5e-3, atol=0)
    (grad,) = torch.autograd.grad(found.sum(), theta.logits)
    assert torch.isfinite(grad).all()


def test_the_retain_term_is_a_mean_of_row_means_not_of_tokens() -> None:
    terms = OBJECTIVES["simnpo"].terms(Given(), ObjectiveConfig())
    mean_of_means = (0.5 / 5 + 6.0 / 20) / 2
    assert math.isclose(terms.retain.mean().item(), mean_of_means, rel_tol=1e-6)
    assert not math.isclose(mean_of_means, 6.5 / 25)


def test_terms_are_one_value_a_row() -> None:
    for name, objective in OBJECTIVES.items():
        terms: Terms = objective.terms(Given(), default_objective(name))
        shapes: list[Any] = [tuple(term.shape) for term in terms]
        assert shapes == [(2,), (2,)], name
