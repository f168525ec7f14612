from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import UserError
from unlearner.request.neighbours import nearest_rows
from unlearner.request.rows import Row
from unlearner.request.tofu import load_authors, load_split

FORGET = [
    Row("Who wrote the novel about the river?", "Mira Okafor wrote it."),
    Row("Which prize did Mira Okafor win?", "She won the Golden Pen."),
]
POOL = [
    Row("What is the boiling point of water?", "It is 100 degrees Celsius."),
    Row("Who wrote the novel about the mountain?", "Ola Berg wrote it."),
    Row("Which prize did Ola Berg win?", "He won the Silver Pen."),
    Row("who wrote  the novel about the river?", "Somebody else did."),
    Row("Pray, who wrote the novel about the river?", "Mira Okafor wrote it."),
]


def test_every_forget_row_gets_its_nearest_in_turn() -> None:
    found = nearest_rows(FORGET, POOL, 2)
    assert found.rows == (POOL[1], POOL[2])
    assert 0 < min(found.likeness) <= max(found.likeness) < 1


def test_the_request_itself_is_never_kept() -> None:
    same = Row("Who wrote the novel about the river, say?", "Mira Okafor wrote it.")
    found = nearest_rows([*FORGET, same], POOL, 10)
    assert found.rows[:2] == (POOL[1], POOL[2])
    assert POOL[3] not in found.rows, "the same question in other letters"
    twin = nearest_rows(FORGET, [*POOL, FORGET[1]], 10)
    assert twin.left_out == 3, "POOL[3], POOL[4] and the twin itself"
    with pytest.raises(UserError, match="No row of the pool is left"):
        nearest_rows(FORGET, FORGET, 3)
    with pytest.raises(UserError, match="none"):
        nearest_rows(FORGET, POOL, 0)


@given(st.permutations(range(len(POOL))))
def test_the_order_of_the_pool_does_not_matter(order: list[int]) -> None:
    expected = set(nearest_rows(FORGET, POOL, 3).rows)
    assert set(nearest_rows(FORGET, [POOL[i] for i in order], 3).rows) == expected


def test_an_authors_neighbours_in_tofu_are_of_its_kind(shared) -> None:
    authors = load_authors(shared / "tofu")
    basil = next(author for author in authors if author.name == "Basil Mahfouz Al-Kuwaiti")
    pool = [row for row in load_split("full", shared / "tofu") if row not in basil.rows]
    found = nearest_rows(basil.rows, pool, 40)
    assert len(set(found.rows)) == 40
    generator = iter(pool[:: len(pool) // 40])
    spread = nearest_rows(basil.rows, list(generator), 40)
    assert sum(found.likeness) > 1.5 * sum(spread.likeness), "nearer than rows taken evenly"
