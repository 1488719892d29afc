"""Prompts one at a time, and which of them a run that goes on later must still see."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from rlcore.engines.episode import PromptSample
from rlcore_recipes.data.loader import PromptLoader


class PromptQueue:
    """The prompts of ``loader``, which are done with in any order.

    Its state is the loader's at the oldest prompt that is not done, and the later ones that are: after `restore` the
    others come again, in their order, and none of these does.
    """

    def __init__(self, loader: PromptLoader) -> None:
        self._loader = loader
        self._next: deque[PromptSample] = deque()
        self._open: set[int] = set()
        self._done: set[int] = set()

    def draw(self) -> PromptSample:
        """Return the next prompt that is not done."""
        while True:
            if not self._next:
                self._next.extend(next(self._loader))
            prompt = self._next.popleft()
            if prompt.position not in self._done:
                self._open.add(prompt.position)
                return prompt

    def done(self, position: int) -> None:
        """Note that the prompt at ``position`` was trained on, or will not be."""
        self._open.remove(position)
        self._done.add(position)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON: the loader's state, and ``ahead``, positions that it must pass over."""
        size = self._loader.batch_size
        waiting = [*self._open, *(prompt.position for prompt in self._next if prompt.position not in self._done)]
        batch = min(waiting, default=self._loader.drawn * size) // size
        self._done = {position for position in self._done if position >= batch * size}
        return {**self._loader.state(), "drawn": batch, "ahead": sorted(self._done)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the queue (or the loader of a synchronous run) that gave ``state`` stood.

        Raises:
            CheckpointError: it went over other data or in another order.
        """
        self._loader.restore(state)
        self._next.clear()
        self._open.clear()
        self._done = set(state.get("ahead", ()))
