"""How hard each attack of a robustness card tries: one place for all bounds and their defaults."""

from __future__ import annotations

from dataclasses import dataclass

from adapters.errors import UserError
from evaluation.robustness.relearning import Method, Relearning
from evaluation.robustness.sampling import Draws

ATTACKS = ("states", "relearn", "sample", "paraphrase", "drop")


@dataclass(frozen=True)
class Settings:
    """How hard each attack tries.

    Attributes:
        attacks: which of `ATTACKS`.
        states: which forms are measured; empty for all that the subject has.
        relearn_share, relearn_steps, relearn_lr, relearn_with: see `relearning.Relearning`.
        samples, temperature, top_p: see `Draws`.
        sample_rows, paraphrase_rows: forget rows that are asked, at equal distances.
        seed: of rows, draws and first weights.
    """

    attacks: tuple[str, ...] = ATTACKS
    states: tuple[str, ...] = ()
    relearn_share: float = 0.1
    relearn_steps: int = 20
    relearn_lr: float | None = None
    relearn_with: Method = "auto"
    samples: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    sample_rows: int = 40
    paraphrase_rows: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [f"there is no attack '{a}'" for a in self.attacks if a not in ATTACKS]
        problems += [] if self.attacks else ["no attack is named"]
        for name in ("relearn_steps", "samples", "sample_rows", "paraphrase_rows"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is below 1")
        if not 0 < self.relearn_share < 1:
            problems.append("relearn_share is not between 0 and 1")
        if not 0 < self.top_p <= 1:
            problems.append("top_p is not above 0 and at most 1")
        for name in ("temperature", "relearn_lr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                problems.append(f"{name} is not above 0")
        if problems:
            raise UserError(
                f"These settings cannot be: {'; '.join(problems)}.",
                f"Attacks are {', '.join(ATTACKS)}.",
            )

    @property
    def relearning(self) -> Relearning:
        """The relearning attack's part of them."""
        return Relearning(
            self.relearn_share, self.relearn_steps, self.relearn_lr, self.relearn_with, self.seed
        )

    @property
    def draws(self) -> Draws:
        """The sampling attack's part, but for the length of answers."""
        return Draws(self.samples, self.temperature, self.top_p, self.seed)
