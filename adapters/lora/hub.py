"""Adapters on the Hugging Face hub: pushed with a card, pulled as plain PEFT files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.atomic_files import copy_file, write_bytes
from adapters.errors import UserError
from adapters.lora.format import CONFIG_NAME, WEIGHTS_NAME, public_name

if TYPE_CHECKING:
    from adapters.store.manifest import ForgetManifest

CARD_NAME = "README.md"
# Figures that are listed in the card's metadata, where the hub reads them.
FIGURES = ("forget_quality", "model_utility", "forget_answer_prob", "retain_answer_prob")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
_TOKEN = re.compile(r"hf_[A-Za-z0-9]+|Bearer \S+")


def push_adapter(
    folder: Path, manifest: ForgetManifest, evals: Mapping[str, Any], repo: str, *, private: bool
) -> str:
    """The address of the commit that holds configuration, weights and card.

    The manifest stays here: its digests and paths are of this store.

    Args:
        folder: the adapter as PEFT loads it.
        manifest: what it was trained on.
        evals: figures by the name of the evaluation.
        repo: `OWNER/NAME`; it is made where it is missing.
        private: of a repository that is made.

    Raises:
        UserError: no such name, no permission, no way to the hub.
    """
    import tempfile

    from huggingface_hub import HfApi

    with _hub_errors(repo), tempfile.TemporaryDirectory(prefix="unlearner-") as scratch:
        aside = Path(scratch)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            copy_file(folder / name, aside / name)
        write_bytes(aside / CARD_NAME, adapter_card(manifest, evals, repo).encode())
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=aside, commit_message="Add the adapter")
    return str(done.commit_url)


def pull_adapter(repo: str, revision: str | None, into: Path) -> Path:
    """`into`, now holding the adapter's configuration and weights.

    Raises:
        UserError: there is no such repository, it holds no adapter, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo):
        cached = Path(
            HfApi().snapshot_download(
                repo, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]
            )
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (cached / name).is_file():
            raise UserError(f"{repo} holds no {name}.", "Name a repository with a PEFT LoRA.")
        copy_file(cached / name, into / name)
    return into


def adapter_card(manifest: ForgetManifest, evals: Mapping[str, Any], repo: str) -> str:
    """The card of an adapter, with its figures where the hub reads them."""
    from huggingface_hub import EvalResult, ModelCardData

    base = public_name(str(manifest.base.get("name") or ""))
    figures = [
        EvalResult(
            task_type="text-generation",
            dataset_type="locuslab/TOFU",
            dataset_name=name,
            metric_type=figure,
            metric_value=values[figure],
        )
        for name, values in evals.items()
        for figure in FIGURES
        if isinstance(values.get(figure), int | float) and not values.get("limit")
    ]
    data = ModelCardData(
        base_model=base if REPO.fullmatch(base) else None,
        library_name="peft",
        tags=["machine-unlearning", "unlearner"],
        model_name=repo.split("/")[-1],
        eval_results=figures or None,
    )
    forget = manifest.data.get("forget", {})
    objective = manifest.objective.get("name", "unknown objective")
    measured = "" if figures else "Nothing was measured on all rows.\n\n"
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo}\n\n"
        f"A forget adapter for {base or 'its base'}: a LoRA trained with {objective} on "
        f"{forget.get('n', 'an unknown number of')} rows.\n\n{measured}"
        "It suppresses, it does not erase: whoever has the base and switches the adapter off has "
        "everything back. Merge it before you release a model.\n\n"
        f'```python\nPeftModel.from_pretrained(base, "{repo}")\n```\n'
    )


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Inside, the hub's errors become a UserError that holds no token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not REPO.fullmatch(repo):
        raise UserError(f"'{repo}' is not the name of a repository.", "Write OWNER/NAME.")
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{repo}: {_TOKEN.sub('[token]', reason)}.",
            "Log in with `hf auth login`, and check the name and the connection.",
        ) from None
