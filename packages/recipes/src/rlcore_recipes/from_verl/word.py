"""Words of a command line, which may not be known before the command runs."""

from __future__ import annotations

from dataclasses import dataclass


class Unknown(Exception):
    """A value that reading alone cannot tell; the message says why, where, and what to give."""


@dataclass(frozen=True)
class Word:
    """One word of a command line.

    Attributes:
        text: without quotes, or why it is not known.
        place: where the word was written, such as ``run.sh:12``.
    """

    text: str | Unknown
    place: str

    def known(self) -> str:
        """Return the text.

        Raises:
            Unknown: it is not known.
        """
        if isinstance(self.text, Unknown):
            raise self.text
        return self.text
