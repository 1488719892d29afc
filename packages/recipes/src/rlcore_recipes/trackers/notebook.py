"""The output of a notebook's cell, which is replaced while a run goes on."""

from __future__ import annotations

import time
from collections import deque
from html import escape

LINES = 200
"""Lines of the table that stay; a notebook keeps what its cells show."""
REFRESH_S = 0.2


class CellOutput:
    """A progress bar above lines of text, in one output of the cell that runs."""

    def __init__(self, name: str, total: int, done: int) -> None:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]  # a notebook has it

        self._name, self._total, self._done = name, total, done
        self._lines: deque[str] = deque(maxlen=LINES)
        self._now = self._eta = ""
        self._refreshed = time.monotonic()
        self._handle = display(self._content(), raw=True, display_id=True)

    def add(self, line: str) -> None:
        """Add a line; the next refresh shows it."""
        self._lines.append(line)

    def advance(self, done: int, eta: str) -> None:
        """Show that ``done`` steps are behind the run, and all lines."""
        self._done, self._eta, self._now = done, eta, ""
        self.refresh()

    def show(self, now: str) -> None:
        """Show what the step is at; calls in quick succession are left out."""
        self._now = now
        if time.monotonic() - self._refreshed >= REFRESH_S:
            self.refresh()

    def refresh(self) -> None:
        """Show the present state."""
        self._refreshed = time.monotonic()
        self._handle.update(self._content(), raw=True)

    def _content(self) -> dict[str, str]:
        parts = [self._name, f"step {self._done}/{self._total}", self._eta and f"eta {self._eta}", self._now]
        title, text = " · ".join(part for part in parts if part), "\n".join(self._lines)
        bar = f"<progress value='{self._done}' max='{self._total}' style='width:40em'></progress>"
        html = f"<div>{escape(title)}</div>{bar}<pre style='overflow-x:auto;line-height:normal'>{escape(text)}</pre>"
        return {"text/plain": f"{title}\n{text}", "text/html": html}
