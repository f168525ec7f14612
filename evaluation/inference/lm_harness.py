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

BATCH_SIZE = 8  # questions at once


def load_tasks(tasks: Sequence[str]) -> Any:
    """The harness's task manager, once it has loaded the tasks: to be done before any model is.

    Args:
        tasks: names of the harness's tasks, groups or tags, or paths of YAML files.

    Raises:
        UserError: the harness is missing, knows no such task, or cannot load its data.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--lm-eval needs the lm-evaluation-harness, which is not installed ({error}).",
            "Install it: pip install 'unlearner[lm-eval]'.",
        ) from error
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
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    try:
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH_SIZE)
        results = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    finally:
        model.train(was_training)
    return task_rows(results)


def task_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of `run_tasks` from what `lm_eval.simple_evaluate` returned, tasks by name."""
    rows = []

    def about(key: str, task: str) -> Any:
        return results.get(key, {}).get(task)

    for task, measured in sorted(results["results"].items()):
        for key, value in measured.items():
            metric, _, chosen = key.partition(",")
            # Beside metrics there are names and counts, without a filter.
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{chosen}")
            higher = (about("higher_is_better", task) or {}).get(metric)
            rows.append(
                {
                    "name": task,
                    "version": about("versions", task),
                    "n": (about("n-samples", task) or {}).get("effective"),
                    "shots": about("n-shot", task),
                    "metric": metric,
                    "filter": chosen,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "better": None if higher is None else "higher" if higher else "lower",
                }
            )
    return rows
