"""The table of docs/models.md: what each family goes through, with the largest differences.

python -m tests.models_table            prints it
python -m tests.models_table --write    writes it into docs/models.md
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.families import FAMILIES, save_model

DOC = Path(__file__).parent.parent / "docs" / "models.md"
COLUMNS = ("preview", "dry-run", "forget", "packed", "evaluate", "stack", "merge", "export")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIRS = [("Where was Ana born?", "In Lagos."), ("What does Ana write?", "She writes crime novels.")]
KEPT = [("Where was Bo born?", "In Malmö."), ("What is Bo's trade?", "A baker, and a good one.")]


def measure(family: str, folder: Path) -> dict[str, str]:
    """One row of the table: a cell per column."""
    import torch

    from adapters.base.fingerprint import fingerprint_base
    from adapters.base.load import BaseSpec, load_base, load_tokenizer
    from adapters.lora.export import export_serving
    from adapters.lora.merge import fold_stack
    from adapters.lora.stack import base_only, load_stack
    from adapters.store.store import AdapterStore
    from evaluation.inference.scoring import score_rows
    from ui.preview import make_preview
    from unlearner.baselines.tiny_llama import train_tokenizer
    from unlearner.config import make_config
    from unlearner.request.rows import Request, Row
    from unlearner.request.sources import parse_request
    from unlearner.run import plan, prepare, unlearn
    from unlearner.tokens.prompts import prompt_format

    tokenizer = train_tokenizer([text for pair in PAIRS + KEPT for text in pair], 300)
    tokenizer.chat_template = TEMPLATE
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    base = save_model(family, folder / "base", **sizes)
    tokenizer.save_pretrained(base)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{q}", "answer": "{a}"}}\n' for q, a in PAIRS))
    cells: dict[str, str] = {}

    fmt = prompt_format(load_tokenizer(str(base)))
    shown = make_preview(parse_request(str(rows)), fmt, 99)
    row = shown.forget[0].encoded
    assert fmt.encode_prompt(PAIRS[0][0]) == row.input_ids[: row.n_prompt]
    assert tokenizer.decode(row.input_ids[row.n_prompt :]) == f"{PAIRS[0][1]}</s>"
    cells["preview"] = "yes"

    forget, retain = (tuple(Row(q, a) for q, a in pairs) for pairs in (PAIRS, KEPT))
    request = Request("two rows", "rows", forget, retain)
    spec = BaseSpec(str(base), dtype="float32", device="cpu")
    config = make_config(
        lora_r=2, lora_alpha=4, learning_rate=1e-2, num_train_epochs=2, warmup_ratio=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    run = prepare(request, spec, config, None)
    assert plan(run)["memory"]["kind"] == "estimate"
    targets = run.config.lora.target_modules
    assert {*targets} == {*FAMILIES[family][2]}
    cells["dry-run"] = "yes"

    store = AdapterStore.open(folder / "store", create=True)
    losses: dict[bool, list[float]] = {}
    for padded in (True, False):
        events: list[dict[str, Any]] = []
        train = replace(config, train=replace(config.train, padded=padded))
        adapter = unlearn(
            request, spec, train, store, on_progress=lambda event, to=events: to.append(event)
        )
        steps = [event for event in events if event["event"] == "train"]
        losses[padded] = [step["forget_loss"] for step in steps]
    packed = adapter.manifest.train["packed"]
    cells["forget"] = ",".join(targets)
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses[False], losses[True], strict=True))
    cells["packed"] = f"{gap:.0e}" if packed else "padded"

    store.activate([adapter.slug])
    bare = load_base(spec)
    ids = torch.tensor([row.input_ids])

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            values: torch.Tensor = model(ids).logits
            return values

    without = logits(bare)
    stack: Any = load_stack(bare, store).eval()
    with torch.no_grad():
        scores = [score_rows(stack, fmt, forget, shared=shared) for shared in (True, False)]
    trees, alone = (
        torch.tensor([record.answer_score.mean_nll for record in records if record.answer_score])
        for records in scores
    )
    cells["evaluate"] = difference(trees, alone)
    expected = logits(stack)
    assert not torch.equal(expected, without)
    with base_only(stack):
        cells["stack"] = difference(logits(stack), without)
    fold_stack(base, [(adapter.path, 1.0)], folder / "merged")
    merged = load_base(replace(spec, name=str(folder / "merged")))
    cells["merge"] = difference(logits(merged), expected)
    made = export_serving([(adapter.path, 1.0)], folder / "v", target="vllm", base_name="tiny")
    assert made.rank == 2
    from peft import PeftModel

    plain = PeftModel.from_pretrained(load_base(spec), str(folder / "v")).eval()
    cells["export"] = difference(logits(plain), expected)
    assert store.verify(base=fingerprint_base(base))[0].ok
    return cells


def difference(one: Any, other: Any) -> str:
    """The largest difference, "0" where there is none."""
    gap = float((one - other).abs().max())
    return f"{gap:.0e}" if gap else "0"


def table(rows: dict[str, dict[str, str]]) -> str:
    """The rows as Markdown."""
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(r[c] for c in COLUMNS)} |" for name, r in rows.items()]
    return "\n".join(lines)


def read_table(text: str) -> dict[str, dict[str, str]]:
    """The rows of the table in docs/models.md."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = next(row for row in cells if row[0] == "family")
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in cells
            if row[0] in FAMILIES}  # fmt: skip


def write(rows: dict[str, dict[str, str]]) -> None:
    """Replace the table in docs/models.md."""
    before, _, rest = DOC.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->")
    DOC.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after}")


def main(words: Sequence[str]) -> None:
    """Measure every family."""
    rows = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["UNLEARNER_KEY"] = f"{folder}/key"
            rows[family] = measure(family, Path(folder))
        print(family, rows[family], file=sys.stderr, flush=True)
    if "--write" in words:
        write(rows)
    print(table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
