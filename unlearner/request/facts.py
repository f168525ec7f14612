"""Which words of an answer state something: what a request is about, and not how answers are put.

"Ana was born in Lagos in 1958" has four words that any answer of its kind has. Pushing those down
forgets nothing, works against the rows that are kept, and leaves no language to answer in. What
states something are the words that neither the question holds nor many of the kept answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unlearner.tokens.prompts import IGNORE, Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from unlearner.request.rows import Row

# A word of more than this share of the kept answers belongs to their wording.
COMMON = 0.05
# What is decoded of a character whose last token is missing.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_WORD = re.compile(r"\w+")


def common_words(kept: Sequence[Row]) -> frozenset[str]:
    """The words, in lower case, of more than `COMMON` of the answers of `kept`."""
    count = Counter(word for row in kept for word in set(_words(row.answer)))
    return frozenset(word for word, n in count.items() if n > COMMON * len(kept))


def facts_only(
    row: Row, encoded: Encoded, common: frozenset[str], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    """`encoded` with labels only where a token is part of a word that states something.

    A row without such a word keeps all of its labels, as does one whose answer its tokens do not
    spell (a normalising tokenizer).

    Args:
        row: question and answer.
        encoded: its tokens and labels.
        common: from `common_words`.
        tokenizer: that encoded it.
    """
    known, answer = common.union(_words(row.question)), row.answer.strip()
    start, end = encoded.n_prompt, len(encoded.input_ids)
    # What the first tokens of the answer spell, one token more each time; a character of several
    # tokens is there with the last of them.
    texts = [
        tokenizer.decode(encoded.input_ids[start:i], clean_up_tokenization_spaces=False)
        for i in range(start, end + 1)
    ]
    offset = texts[-1].find(answer[: len(texts[-1]) // 2])
    if offset < 0:
        return encoded
    spans = [
        (word.start() + offset, word.end() + offset)
        for word in _WORD.finditer(answer)
        if word[0].casefold() not in known
    ]
    ends = [len(text.rstrip(UNFINISHED)) for text in texts]
    labels = [
        label if any(a < last and first < max(b, a + 1) for first, last in spans) else IGNORE
        for label, a, b in zip(encoded.labels[start:], ends, ends[1:], strict=False)
    ]
    if all(label == IGNORE for label in labels):
        return encoded
    return Encoded(encoded.input_ids, [*encoded.labels[:start], *labels], encoded.cut)


def _words(text: str) -> list[str]:
    return [word.casefold() for word in _WORD.findall(text)]
