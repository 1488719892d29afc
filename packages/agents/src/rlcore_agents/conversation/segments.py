"""Trees of segments that share their common beginnings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlcore.engines.episode import Segment
from rlcore_agents.conversation.prefix import shared_length

ROOT = 0


@dataclass
class _Node:
    segment: Segment
    parent: int
    children: list[int] = field(default_factory=list)


class SegmentTree:
    """Segments, of which those that are not sampled are divided where paths part; sampled ones stay whole.

    Node 0 is an empty root. Numbers of sampled nodes do not change.
    """

    def __init__(self) -> None:
        self._nodes = [_Node(Segment(()), -1)]

    def add(self, prompt: Sequence[int], sampled: Segment, after: int | None) -> int:
        """Add ``sampled`` after ``prompt`` and return its node.

        Args:
            after: the sampled node whose path ``prompt`` goes on from, if that is known.
        """
        node, position = self._walk(prompt, after)
        if position < len(prompt):
            inner = self._longest_child(node, prompt, position)
            if inner is not None:
                child, length = inner
                node, position = self._divide(child, length), position + length
        if position < len(prompt):
            node = self._append(Segment(prompt[position:]), node)
        return self._append(sampled, node)

    def prompt_length(self, tokens: Sequence[int], after: int | None) -> int:
        """Return how many of ``tokens`` come before the first sampled one in the row that they would join."""
        path = self._path(self._walk(tokens, after)[0])
        length = 0
        for node in path:
            if self._nodes[node].segment.sampled:
                return length
            length += len(self._nodes[node].segment.tokens)
        return len(tokens)

    def reward(self, node: int, reward: float) -> None:
        """Add ``reward`` to that of a sampled node."""
        segment = self._nodes[node].segment
        self._nodes[node].segment = replace(segment, reward=reward + (segment.reward or 0.0))

    def ordered(self) -> tuple[Segment, ...]:
        """Return the segments, each after its parent, depth first; () without any."""
        top = self._nodes[ROOT].children
        stack = [ROOT] if len(top) > 1 else list(top)
        places: dict[int, int] = {}
        segments: list[Segment] = []
        while stack:
            number = stack.pop()
            node = self._nodes[number]
            parent = places.get(node.parent)
            places[number] = len(segments)
            segments.append(replace(node.segment, parent=None if parent == len(segments) - 1 else parent))
            stack += reversed(node.children)
        return tuple(segments)

    def _walk(self, tokens: Sequence[int], after: int | None) -> tuple[int, int]:
        """Return the last node, and the length, of the path that shares most of ``tokens`` with it and a child.

        Whole nodes only: the part of a child is `_longest_child`'s.
        """
        start = ROOT if after is None else after
        length = sum(len(self._nodes[node].segment.tokens) for node in self._path(start))
        best, most, stack = (start, length), -1, [(start, length)]
        while stack:
            node, position = stack.pop()
            inner = self._longest_child(node, tokens, position)
            shared = position + (inner[1] if inner else 0)
            if shared >= most:  # of a node and a child that is shared as a whole, the child
                best, most = (node, position), shared
            for child in self._nodes[node].children:
                own = len(self._nodes[child].segment.tokens)
                if own and self._shared(child, tokens, position) == own:
                    stack.append((child, position + own))
        return best

    def _longest_child(self, node: int, tokens: Sequence[int], position: int) -> tuple[int, int] | None:
        """Return the child that is not sampled and shares most tokens, and how many; None if none shares any."""
        shared = [
            (self._shared(child, tokens, position), -child)
            for child in self._nodes[node].children
            if not self._nodes[child].segment.sampled
        ]
        length, child = max(shared, default=(0, 0))
        return (-child, length) if length else None

    def _shared(self, node: int, tokens: Sequence[int], position: int) -> int:
        own = self._nodes[node].segment.tokens
        return shared_length(own, tokens[position : position + len(own)])

    def _divide(self, node: int, length: int) -> int:
        """Divide a node that is not sampled after ``length`` tokens and return the first part."""
        rest = self._nodes[node]
        first = self._append(Segment(rest.segment.tokens[:length]), rest.parent, instead_of=node)
        rest.segment = Segment(rest.segment.tokens[length:])
        rest.parent = first
        self._nodes[first].children.append(node)
        return first

    def _append(self, segment: Segment, parent: int, instead_of: int | None = None) -> int:
        number = len(self._nodes)
        self._nodes.append(_Node(segment, parent))
        siblings = self._nodes[parent].children
        if instead_of is None:
            siblings.append(number)
        else:
            siblings[siblings.index(instead_of)] = number
        return number

    def _path(self, node: int) -> list[int]:
        path = []
        while node >= 0:
            path.append(node)
            node = self._nodes[node].parent
        return path[::-1]
