"""Completions of the student in the tokens of a teacher with another tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlcore_recipes.distillation.text_alignment import UNSCORED, align, readable
from rlcore_recipes.distillation.token_bytes import TokenBytes


@dataclass
class Translation:
    """A completion in both tokenisations.

    Attributes:
        tokens: the teacher's.
        student_chunks: chunk of each student token, from 0 on in the order of the text; -1: the teacher has no say.
        teacher_chunks: chunk of each of ``tokens``.
        chunks: number of chunks.
    """

    tokens: list[int] = field(default_factory=list)
    student_chunks: list[int] = field(default_factory=list)
    teacher_chunks: list[int] = field(default_factory=list)
    chunks: int = 0

    def append(self, tokens: Sequence[int], student: Sequence[int], teacher: Sequence[int]) -> None:
        """Append a part whose chunks are counted from 0."""
        first, count = self.chunks, max(student, default=UNSCORED) + 1
        self.tokens += tokens
        self.student_chunks += [chunk if chunk == UNSCORED else chunk + first for chunk in student]
        self.teacher_chunks += [chunk if chunk == UNSCORED else chunk + first for chunk in teacher]
        self.chunks += count


class Translator:
    """Turns the student's tokens into the teacher's tokens of the same text.

    The end of an answer is the teacher's end token, and special tokens of the same name are each other. Other special
    tokens of the student are text for the teacher, about which it is not asked.

    Args:
        ends: tokens that end a completion of the student.
    """

    def __init__(self, student: TokenBytes, teacher: TokenBytes, ends: frozenset[int]) -> None:
        self._student, self._teacher, self._ends = student, teacher, ends
        self._special: Mapping[int, int] = teacher.specials_named_as(student)

    def completion(self, tokens: Sequence[int], end: int | None) -> Translation | None:
        """Return the translation of a completion; None if the teacher's tokenizer changes its text.

        Args:
            end: token that ends an answer of the teacher; None if none does.
        """
        made, part = Translation(), list[int]()
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            ended = index == last and token in self._ends
            if not ended and token not in self._student.special:
                part.append(token)
                continue
            if not self._append_text(made, part, cut=False):
                return None
            part = []
            same = end if ended else self._special.get(token)
            if same is not None:
                made.append([same], [0], [0])
            elif ended:
                made.append([], [UNSCORED], [])
            elif not self._append_name(made, token):
                return None
        return made if self._append_text(made, part, cut=True) else None

    def _append_text(self, made: Translation, part: Sequence[int], *, cut: bool) -> bool:
        """Append a part without special tokens; return whether the teacher's tokenizer leaves its text as it is."""
        if not part:
            return True
        student = self._student.of(part)
        tokens = self._teacher.encode(readable(b"".join(student), cut=cut).data.decode())
        if tokens is None:
            return False
        made.append(tokens, *align(student, self._teacher.of(tokens), cut=cut))
        return True

    def _append_name(self, made: Translation, token: int) -> bool:
        """Append a special token that the teacher does not have, as text."""
        tokens = self._teacher.encode(b"".join(self._student.of([token])).decode())
        if tokens is None:
            return False
        made.append(tokens, [UNSCORED], [UNSCORED] * len(tokens))
        return True
