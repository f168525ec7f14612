"""The Python API of evaluation: figures of a base with its active adapters, as an object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.base.load import base_view
from adapters.environment import threads_for
from adapters.errors import UserError
from evaluation.cache import key_of
from evaluation.inference.generation import generate_answers
from evaluation.logs import read_log
from evaluation.logs.records import EvalLog, write_json, write_log
from evaluation.metrics.summary import figure_table, summarise
from evaluation.protocols import DEFAULT, Decoding
from evaluation.suite import EvalData, load_eval_data
from evaluation.suite import evaluate as measure
from unlearner.api import Base, html_table, parameters_named, progress_bar
from unlearner.request.rows import Request

if TYPE_CHECKING:
    import pandas

SHOWN = ("forget_quality", "model_utility", "forget_answer_prob", "retain_answer_prob")
OWN_ROWS = "own-rows"


@dataclass(frozen=True, repr=False)
class EvalResult:
    """Figures of one evaluation, with the log they were computed from.

    Attributes:
        log: every row with its scores and answers.
        figures: all figures by name, see `evaluation.metrics.summary.summarise`.
        split: what was evaluated.
        base: name of the base.
        stack: slug and strength of the active adapters.
    """

    log: EvalLog = field(compare=False)
    figures: Mapping[str, Any]
    split: str
    base: str
    stack: tuple[tuple[str, float], ...] = ()

    @property
    def forget_quality(self) -> float | None:
        """The KS test's p-value of the truth ratios against the reference; None without one."""
        value: float | None = self.figures["forget_quality"]
        return value

    @property
    def model_utility(self) -> float | None:
        """Harmonic mean of the nine parts over the sets that are kept; None without the sets."""
        value: float | None = self.figures["model_utility"]
        return value

    @property
    def table(self) -> list[dict[str, Any]]:
        """Every figure as a row: name, value, interval, better, n, and why it is missing."""
        return figure_table(self.figures)

    def to_frame(self) -> pandas.DataFrame:
        """The figures as a table of pandas, one a row.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UserError(
                "to_frame() needs pandas, which is not installed.",
                "Run `pip install pandas`, or use `.table`, a list of dicts.",
            ) from None
        frame: pandas.DataFrame = pandas.DataFrame(self.table).set_index("name")
        return frame

    def save(self, folder: str | Path) -> Path:
        """Write `eval_log.json` and `figures.json` into the folder, as `--out` does."""
        out = Path(folder)
        write_log(self.log, out / "eval_log.json")
        write_json(out / "figures.json", dict(self.figures))
        return out

    def _facts(self) -> dict[str, Any]:
        on = ", ".join(slug if s == 1 else f"{slug} at {s:g}" for slug, s in self.stack)
        shown = {
            name: "-" if self.figures[name] is None else f"{self.figures[name]:.4g}"
            for name in SHOWN
        }
        about = {"base": self.base, "adapters": on or "none", "split": self.split}
        limited = "first rows only" if self.figures["limited"] else None
        return {**about, "protocol": self.figures["protocol"], "limited": limited, **shown}

    def __repr__(self) -> str:
        facts = [(name, value) for name, value in self._facts().items() if value is not None]
        lines = "\n".join(f"  {name:<19} {value}" for name, value in facts)
        return f"EvalResult(\n{lines}\n)"

    def _repr_html_(self) -> str:
        return html_table(self._facts().items())


def evaluate(
    base: Base,
    rows: str | Request | EvalData,
    *,
    reference: EvalLog | EvalResult | str | Path | None = None,
    data: str | Path | None = None,
    protocol: str = DEFAULT,
    limit: int | None = None,
    generate: bool = True,
    out: str | Path | None = None,
    progress: bool | Callable[[Mapping[str, Any]], None] | None = None,
) -> EvalResult:
    """Score and answer the rows with the base as it is now, its active adapters included.

    Args:
        base: from `load_base`.
        rows: a forget split of TOFU (`forget05`), a request, or rows by set.
        reference: log of a model that never saw the forget rows: forget quality needs it.
        data: folder of TOFU's files, else the hub.
        protocol: one of `evaluation.protocols.PROTOCOLS`.
        limit: only the first rows of each set, a quick look.
        generate: False leaves out the answers, and with them ROUGE and model utility.
        out: folder for log and figures; finished parts are cached there.
        progress: show a bar (None: on a terminal and in a notebook), or what gets the events.

    Raises:
        UserError: no such split or protocol, rows that differ from the reference's.
    """
    folder = None if data is None else Path(data)
    with parameters_named(), progress_bar("evaluate", progress) as report:
        if isinstance(rows, str):
            split, chosen = rows.removeprefix("tofu:"), load_eval_data(rows, folder)
        elif isinstance(rows, Request):
            split, chosen = OWN_ROWS, EvalData(rows.rows, rows.retain)
        else:
            split, chosen = OWN_ROWS, rows
        known = reference.log if isinstance(reference, EvalResult) else reference
        retain_log = read_log(known) if isinstance(known, str | Path) else known
        stack = [list(pair) for pair in base.stack]
        log = measure(
            base.model,
            base.fmt,
            chosen,
            protocol=protocol,
            retain_log=retain_log,
            limit=limit,
            generate=generate,
            key=key_of(base=base.fingerprint.digest, adapters=stack),
            resume_dir=None if out is None else Path(out) / "parts",
            on_progress=lambda label, done, total: report(
                {"event": "measure", "text": label, "step": done, "steps": total}
            ),
            meta={"split": split, "adapters": stack, **base_view(base.model)},
        )
        figures = summarise(log, retain_log, protocol=protocol)
    result = EvalResult(log, figures, split, base.spec.name, base.stack)
    if out is not None:
        result.save(out)
    return result


def answer(
    base: Base, question: str | Sequence[str], *, max_new_tokens: int = 200
) -> str | list[str]:
    """What the base with its active adapters answers, greedily; a list for several questions."""
    questions = [question] if isinstance(question, str) else list(question)
    decoding = Decoding("answer", max_new=max_new_tokens)
    with parameters_named(), threads_for(base.model):
        answers = generate_answers(base.model, base.fmt, questions, [decoding])["answer"]
    return answers[0] if isinstance(question, str) else answers
