"""Ctrl-C and SIGTERM ask a run to finish its step and save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Progress = Callable[[dict[str, Any]], None]


class StopRequest:
    """Whether the user asked to stop: the first signal sets it, the second one acts at once."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, on_progress: Progress | None = None) -> Iterator[StopRequest]:
        """Inside: Ctrl-C and SIGTERM ask the run to finish its step and save.

        A second signal does what it would have done before (a KeyboardInterrupt). Outside the
        main thread signals cannot be caught and are left as they are.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self.asked = True
            restore()
            if on_progress is not None:
                on_progress({"event": "stopping"})

        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def restore() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        for number in handlers:
            signal.signal(number, ask)
        try:
            yield self
        finally:
            restore()
