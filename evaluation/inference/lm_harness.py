"""Tasks of EleutherAI's lm-evaluation-harness on the loaded model, adapters and all.

An optional extra: `lm_eval` is imported only when tasks are named.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_ABOUT_ROW = ("alias", "name", "sample_len", "sample_count")


def require_lm_eval() -> Any:
    """The `lm_eval` module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"--lm-eval needs the lm-evaluation-harness, which is not installed ({error}).",
            "Install it: pip install 'unlearner[lm-eval]'.",
        ) from error
    return lm_eval


def load_tasks(tasks: Sequence[str]) -> Any:
    """The harness's task manager, once it has loaded the tasks: to be done before any model is.

    Args:
        tasks: names of the harness's tasks, groups or tags, or YAML files of one's own.

    Raises:
        UserError: the harness is missing, knows no such task, or cannot load its data.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    try:
        manager.load(list(tasks))
    # Each task loads its data in its own way, from the hub or a file: any failure is the task's.
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0].strip("'\"")
        raise UserError(
            f"lm-eval cannot load {', '.join(tasks)}: {reason.rstrip('.')}.",
            "`lm-eval ls tasks` lists the names; a task's data comes from the hub unless it is "
            "in the cache.",
        ) from error
    return manager


def run_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Each task's metrics with their standard error, as the harness reports them.

    A row has name, version, n (questions), metric, filter, value, stderr (None where the
    harness gives none), better ("higher", "lower" or None) and shots. Prompts are the task's own,
    without a chat template.

    Args:
        model: with its active adapters; its mode is restored.
        tokenizer: of the base; the harness gets a copy, since it sets the pad token.
        tasks, manager: see `load_tasks`.
        limit: only the first so many questions of each task.
        batch_size: questions at once.

    Raises:
        UserError: see `require_lm_eval`.
    """
    lm_eval = require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            log_samples=False,
        )
    finally:
        model.train(was_training)
    return task_rows(results)


def task_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `run_tasks` from what `lm_eval.simple_evaluate` returned, tasks by name."""
    rows = []
    for task, measured in sorted(results["results"].items()):
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            if key in _ABOUT_ROW or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = measured.get(f"{metric}_stderr,{chosen}")
            higher = results.get("higher_is_better", {}).get(task, {}).get(metric)
            rows.append(
                {
                    "name": task,
                    "version": results.get("versions", {}).get(task),
                    "n": results.get("n-samples", {}).get(task, {}).get("effective"),
                    "shots": results.get("n-shot", {}).get(task),
                    "metric": metric,
                    "filter": chosen or None,
                    "value": float(value),
                    "stderr": float(error) if _is_number(error) else None,
                    "better": None if higher is None else "higher" if higher else "lower",
                }
            )
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
