"""What long work reports while it runs, put on the console: steps on a line, the rest in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ui.console import Console, size_text

Progress = Callable[[str, int, int], None]

WORDS = {
    "load": "Loading the base ...",
    "publish": "Storing the adapter ...",
}
# What a step of this kind does, where the event does not say it itself.
DOING = {"pretrain": "training", "train": "", "measure": "measuring"}
STOPPING = "Finishing this step and saving. Press Ctrl-C again to stop at once."


def show_event(event: Mapping[str, Any], console: Console) -> None:
    """Shows one event; `job` says which of several that run side by side it belongs to."""
    kind, job = str(event.get("event", "")), str(event.get("job", ""))
    if kind == "stopping":
        console.urgent(STOPPING)
    elif kind == "gap" and event.get("stopped_at_step") is not None:
        reached, kept = event.get("reached_at_step"), event["kept_step"]
        when = "reached" if reached in (None, event["step"]) else f"reached at step {reached}"
        weights = f"the weights of step {kept}"
        if isinstance(kept, float):
            weights = "weights between those of the last two readings"
        console.words(
            f"Step {event['step']}: {reading_text(event)}, {when}: stopping with {weights}."
        )
    elif event.get("step") is not None:
        reading = reading_text(event) if kind == "gap" else ""
        doing = reading or str(event.get("text") or DOING.get(kind, kind))
        console.progress({**event, "message": " ".join(part for part in (job, doing) if part)})
    elif kind == "probe":
        peak, limit = size_text(event["peak_bytes"]), size_text(event["limit_bytes"])
        console.words(f"Two steps on the longest rows take {peak} of {limit}.")
    elif text := event.get("text") or WORDS.get(kind):
        console.words(f"{job}: {text}" if job else str(text))


def reading_text(event: Mapping[str, Any]) -> str:
    """A reading of the distance to the retrain reference or target."""
    if "target" in event:
        return f"forget NLL {event['forget_nll']:.2f}, target {event['target']:.2f}"
    return (
        f"log R {event['gap']:+.3f}, forget NLL {event['nll_gap']:+.2f} against the retrain "
        f"reference (KS D {event['ks']:.3f})"
    )


def outcome_lines(outcome: Mapping[str, Any]) -> list[str]:
    """What a run did to forget, retain and general rows, a line each."""
    lines = []
    for name, part in outcome.items():
        before, after = part["before"], part["after"]
        how = ", not trained on" if part["held_out"] else ", trained on"
        of = f" of {part['of']}" if part.get("of", part["rows"]) > part["rows"] else ""
        lines.append(
            f"{name:<8} P {before['probability']:.3f} -> {after['probability']:.3f}, "
            f"NLL {before['nll']:.2f} -> {after['nll']:.2f} ({part['rows']}{of} rows{how})"
        )
    return lines


def progress_of(console: Console) -> Progress:
    """A callback that shows a label with done of all, elapsed and remaining seconds."""
    started: dict[str, float] = {}
    last = time.monotonic()

    def show(label: str, done: int, total: int) -> None:
        nonlocal last
        # The first report of a label comes after its first batch: its clock began before that.
        elapsed = time.monotonic() - started.setdefault(label, last)
        last = time.monotonic()
        event = {"message": label, "step": done, "steps": total, "elapsed": elapsed}
        if done:
            event["remaining"] = elapsed / done * (total - done)
        console.progress({**event, "unit": "rows"})

    return show
