"""The evaluation protocols: what is measured on which rows, and how answers are decoded.

Papers differ in all four columns (SPEC section 3), so a figure needs its protocol beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How answers are generated; exactly one of the two budgets is set.

    Attributes:
        name: what answers are filed under in a log.
        max_total: prompt and answer together, in tokens, or
        max_new: the answer alone.
        sample: draw from the model's distribution instead of taking the likeliest token.
        temperature, top_k, top_p, seed: of the draw.
    """

    name: str
    max_total: int | None = None
    max_new: int | None = None
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def budget(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of this length may have."""
        if self.max_new is not None:
            return self.max_new
        return max(0, (self.max_total or 0) - prompt_tokens)


GREEDY_TOTAL = Decoding("greedy-200-total", max_total=200)
GREEDY_NEW = Decoding("greedy-200-new", max_new=200)
# Llama-2-chat's generation config; top-k 50 was transformers' silent default beside it.
SAMPLED_TOTAL = Decoding(
    "sampled-200-total", max_total=200, sample=True, temperature=0.6, top_k=50, top_p=0.9, seed=0
)


@dataclass(frozen=True)
class Protocol:
    """One way to turn a model into the published numbers.

    Attributes:
        name: what results are labelled with.
        decoding: of the answers that ROUGE is computed on.
        max_rows: only the first so many rows of each set, None for all.
        max_length: texts are cut at so many tokens before they are scored, prompt included.
        truth_ratio: the mean over the perturbed answers.
        source: whose protocol it is.
    """

    name: str
    decoding: Decoding
    max_rows: int | None
    max_length: int
    truth_ratio: Literal["geometric", "arithmetic"]
    source: str


DEFAULT = "tofu"
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("tofu", GREEDY_TOTAL, 300, 200, "geometric", "locuslab/tofu, released code"),
        Protocol("simnpo", SAMPLED_TOTAL, 300, 200, "geometric", "OPTML-Group/Unlearn-Simple"),
        Protocol("tofu-paper", GREEDY_TOTAL, None, 200, "arithmetic", "arXiv 2401.06121, text"),
        Protocol("open-unlearning", GREEDY_NEW, None, 512, "geometric", "arXiv 2506.12618"),
    )
}


def protocol_named(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        UserError: there is none; the known ones are listed.
    """
    if name not in PROTOCOLS:
        raise UserError(f"There is no protocol '{name}'.", f"Choose one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]


def protocols_named(text: str) -> list[Protocol]:
    """The protocols in `text`: a name, several separated by commas, or "all"; each once.

    Raises:
        UserError: none, or one that does not exist.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(PROTOCOLS.values())
    if not names:
        raise UserError("No protocol is named.", f"Choose from {', '.join(PROTOCOLS)}, or all.")
    return list({name: protocol_named(name) for name in names}.values())
