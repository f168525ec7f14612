"""What one answer tells, in a word: still knows, vague, refuses, broken.

The rule, in this order; the first that holds is the verdict:

1. **broken**: no letters at all, or a word four times in a row, or, from 12 words on, fewer than
   half of its three-word runs are different ones.
2. **refuses**: one of `REFUSING` stands in it (the wordings of TOFU's and our refusals).
3. **still knows**: ROUGE-L recall against the true answer of at least 0.8, or the true answer's
   probability (geometric mean a token) of at least 0.7.
4. **vague**: anything else: other facts, or none.

Without a true answer only the first two can be told; else the verdict is "not judged".
The thresholds are ours: a model that never saw an author shares wording with the true answer by
chance (ROUGE-L 0.41 in TOFU's retrained Llama-2-7B), one that knows is above 0.9.
"""

from __future__ import annotations

import re

from evaluation.metrics.text import repeats_in_a_row

KNOWS_ROUGE, KNOWS_PROB = 0.8, 0.7
RUN = 4
LONG, DISTINCT = 12, 0.5
STILL_KNOWS, VAGUE, REFUSES, BROKEN = "still knows", "vague", "refuses", "broken"
NOT_JUDGED = "not judged"
REFUSING = re.compile(
    r"\bI(?: do not|'m not| don['’]t| am not| can(?:no|['’])t| have no| haven['’]t)\b"
    r"|\b(?:no|not any) (?:information|knowledge|record)\b"
    r"|\bnot (?:sure|certain|familiar|aware|known to me)\b|\bunable to\b|\bbeyond my\b",
    re.IGNORECASE,
)
RULE = (
    "broken: no letters, a word four times in a row, or mostly repeated three-word runs. "
    "refuses: says that it does not know. still knows: ROUGE-L of at least 0.8, or the true "
    "answer's probability of at least 0.7. vague: anything else. A probe, not a proof."
)


def verdict(
    text: str, rouge_l_recall: float | None = None, answer_prob: float | None = None
) -> str:
    """The word for an answer; scores are None where no true answer is known."""
    words = re.findall(r"\w+", text.casefold())
    if is_broken(words):
        return BROKEN
    if REFUSING.search(text):
        return REFUSES
    if rouge_l_recall is None and answer_prob is None:
        return NOT_JUDGED
    knows = (rouge_l_recall or 0.0) >= KNOWS_ROUGE or (answer_prob or 0.0) >= KNOWS_PROB
    return STILL_KNOWS if knows else VAGUE


def is_broken(words: list[str]) -> bool:
    """Whether these words are no sentence but a stutter, or nothing."""
    if not any(word.isalpha() for word in words):
        return True
    if repeats_in_a_row(words, 1, RUN):
        return True
    if len(words) < LONG:
        return False
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) < DISTINCT * len(runs)
