"""Packs score rows as if each stood alone; what would leak is shown to be noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.base.load import BaseSpec, load_base, load_tokenizer
from unlearner.objectives.likelihood import answer_nll, packs_exactly
from unlearner.request.tofu import load_split
from unlearner.tokens.packing import PACK_ATTENTION, pack_attention, pack_rows
from unlearner.tokens.prompts import Encoded, pad_batch, prompt_format
from unlearner.training.forward import part_of_batch


def llama(seed: int = 0, **shape: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 32000, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "sdpa",
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[Encoded]:
    """Real rows in real tokens, among them one whose answer's quote merges into the prompt."""
    fmt = prompt_format(load_tokenizer(str(shared / "llama2-tokenizer")))
    found = load_split("forget05", shared / "tofu")
    quoted = [row for row in found if row.answer.startswith('"')][:2]
    return [fmt.encode(row.question, row.answer) for row in [*quoted, *found[:14]]]


def alone(model: Any, rows: list[Encoded]) -> torch.Tensor:
    return torch.stack([answer_nll(model, pad_batch([row], 0)).nll[0] for row in rows])


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_real_rows_score_in_a_pack_as_alone(attention: str, rows: list[Encoded]) -> None:
    """float64: largest difference 1e-10 of sums up to 1,000 nats, grouped heads included."""
    kind = "sdpa" if attention == "varlen" else attention
    model = llama(attn_implementation=kind).double()
    with torch.no_grad():
        expected = alone(model, rows)
        if attention == "varlen":
            with pack_attention(model):
                assert model.config._attn_implementation == PACK_ATTENTION
                found = answer_nll(model, pack_rows(rows))
            assert model.config._attn_implementation == "sdpa"
        else:
            found = answer_nll(model, pack_rows(rows))
    assert found.n.tolist() == [row.n_targets for row in rows]
    # NLL is summed in float32, which is all that differs.
    torch.testing.assert_close(found.nll, expected, rtol=2e-6, atol=0)
    assert expected.max() > 300


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_gradients_of_a_pack_are_those_of_the_rows(attention: str, rows: list[Encoded]) -> None:
    """float64: largest difference 1e-6 relative to the largest gradient (sums are float32)."""
    gradients = []
    for batch in (pad_batch(rows, 0), pack_rows(rows)):
        model = llama().double()
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        packed = "starts" in batch
        if packed and attention == "varlen":
            with pack_attention(model):
                (answer_nll(model, batch).per_token ** 2).sum().backward()
        else:
            (answer_nll(model, batch).per_token ** 2).sum().backward()
        gradients.append(weight.grad)
    scale = float(gradients[0].abs().max())
    assert scale > 0
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-6 * scale


def test_padded_batches_are_unchanged_under_pack_attention(rows: list[Encoded]) -> None:
    model = llama()
    with torch.no_grad():
        before = answer_nll(model, pad_batch(rows, 0)).nll
        with pack_attention(model):
            after = answer_nll(model, pad_batch(rows, 0)).nll
    assert torch.equal(before, after)


def test_the_start_up_check_finds_rows_that_see_each_other(rows: list[Encoded]) -> None:
    model = llama()
    assert packs_exactly(model, rows[:3]) == (True, pytest.approx(0.0, abs=1e-5))

    class Leaking(torch.nn.Module):
        """As a cache does it: the whole pack as one row."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model
            self.config = model.config

        def get_base_model(self) -> Any:
            return self.inner

        def forward(self, **inputs: Any) -> Any:
            if "position_ids" in inputs:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs = {k: v for k, v in inputs.items() if not k.startswith(("cu_", "max_l"))}
            return self.inner(**inputs)

    fits, gap = packs_exactly(Leaking(), rows[:3])
    assert not fits
    assert gap > 1e-3


def test_the_default_cache_leaks_and_ours_is_off(rows: list[Encoded]) -> None:
    """What the start-up check is for: transformers' own default, on the same pack."""
    model = llama(attn_implementation="eager")
    batch = pack_rows(rows[:4])
    asked = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        ours = model(**asked, use_cache=False).logits
        default = model(**asked).logits
    assert float((ours - default).abs().max()) > 0.1


def test_a_model_without_positions_cannot_pack(rows: list[Encoded]) -> None:
    class NoPositions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.config = self.inner.config

        def get_base_model(self) -> Any:
            return self.inner

        def forward(
            self, input_ids: Any, attention_mask: Any, logits_to_keep: Any, use_cache: bool
        ) -> Any:
            return self.inner(input_ids, attention_mask, logits_to_keep=logits_to_keep)

    assert packs_exactly(NoPositions(), rows[:2]) == (False, float("inf"))


def test_a_part_of_a_pack_is_a_pack(rows: list[Encoded]) -> None:
    whole = pack_rows(rows[:6])
    for name, tensor in part_of_batch(whole, 2, 5).items():
        assert torch.equal(tensor, pack_rows(rows[2:5])[name]), name


def test_nf4_packs_too(tiny_base: Path) -> None:
    """nf4 with float32 compute: largest difference 1e-4 a token."""
    pytest.importorskip("bitsandbytes")
    fmt = prompt_format(load_tokenizer(str(tiny_base)))
    rows = [fmt.encode("Who wrote it?", "Mira."), fmt.encode("Where?", "In the city of Lagos.")]
    model = load_base(BaseSpec(str(tiny_base), load_in_4bit=True, device="cpu"))
    with pack_attention(model):
        fits, gap = packs_exactly(model, rows)
    assert fits
    assert gap < 1e-4
