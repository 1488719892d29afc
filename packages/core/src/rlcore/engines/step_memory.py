"""`StepMemory`: the memory of a training step, as a training engine estimates it.

A micro-batch of T tokens takes, in addition to what is allocated already::

    later + fixed + T · per_token

``later`` are the optimizer's two moments before the first step, ``fixed`` the gradients, gathered parameters and the
chunk of logits, and ``per_token`` the activations that are kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

SAFE = 0.8
"""Share of the free memory that may be planned with: allocators fragment memory, and the step is estimated."""


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step of one engine in one process, in bytes; see the module for the terms.

    Attributes:
        place: name of the memory; processes that share it give the same name.
        free: bytes free in that memory, for all processes that share it.
        parameters: numbers in the model, of all processes together; None if this process does not know.
    """

    place: str
    free: int
    later: int
    fixed: int
    per_token: int
    parameters: int | None

    def needed(self, tokens: int) -> int:
        """Return the bytes that a step with micro-batches of ``tokens`` takes, beyond ``later``."""
        return self.fixed + tokens * self.per_token
