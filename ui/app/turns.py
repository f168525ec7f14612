"""One GPU job at a time: a line of waiting jobs, each of which knows how many are before it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A first-come line. Take a ticket, wait until nobody is ahead, leave when done."""

    def __init__(self) -> None:
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many are in the line, the one being served included."""
        return len(self._line)

    def join(self) -> object:
        """A ticket at the end of the line."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        return ticket

    def ahead(self, ticket: object) -> int:
        """How many come first; 0 means that it is this ticket's turn."""
        with self._changed:
            return self._line.index(ticket)

    def leave(self, ticket: object) -> None:
        """Gives up the ticket, served or not; leaving twice does no harm."""
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
                self._changed.notify_all()

    def waiting(self, ticket: object, seconds: float = 0.5) -> Iterator[int]:
        """Yields how many are ahead, now and whenever it changes, and ends when it is 0."""
        last = -1
        while True:
            with self._changed:
                ahead = self._line.index(ticket)
                if ahead == 0:
                    return
                if ahead == last:
                    self._changed.wait(seconds)
                    continue
                last = ahead
            yield ahead

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Inside it is the caller's turn."""
        ticket = self.join()
        try:
            for _ in self.waiting(ticket):
                continue
            yield
        finally:
            self.leave(ticket)
