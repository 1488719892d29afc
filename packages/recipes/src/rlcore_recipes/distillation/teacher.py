"""Teachers: what they are asked for, and those that are training engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlcore.batch import Batch
from rlcore.engines import ForwardRequest, TrainEngine
from rlcore.engines.train import Output


@dataclass(frozen=True)
class TeacherRequest:
    """What a teacher says of the distribution that predicts each trained token.

    Attributes:
        logprobs: the log-prob of the token itself: column ``teacher_logprobs`` ``[T]`` fp32.
        top_k: the so many most likely tokens, the best first: ``teacher_top_ids`` ``[T, k]`` int64 and
            ``teacher_top_logprobs`` ``[T, k]`` fp32; 0 asks for none.
        states: the hidden states before the output layer: ``teacher_states`` ``[T, hidden]``.
        temperature: divides the teacher's logits.
        vocabulary: the distribution is over the first so many token ids, renormalised.
    """

    logprobs: bool = False
    top_k: int = 0
    states: bool = False
    temperature: float = 1.0
    vocabulary: int | None = None


class Teacher(Protocol):
    """A model that rates completions."""

    def add_columns(self, batch: Batch, request: TeacherRequest) -> Batch:
        """Return ``batch`` with the columns that ``request`` names; entries are 0 where ``loss_mask`` is 0.

        Args:
            batch: ``tokens`` and ``loss_mask``, in the teacher's context and with the student's token ids. It may be in
                worker processes: `rlcore.controller.Executor.compute` calls a function that reads it.

        Raises:
            RlcoreError: the teacher cannot be reached, or cannot say what is asked.
        """
        ...


@dataclass(frozen=True)
class EngineTeacher:
    """A teacher in a training engine.

    Attributes:
        adapters: False teaches with the frozen weights below the adapters.
        offload: move the model to host memory afterwards.
    """

    engine: TrainEngine
    adapters: bool = True
    offload: bool = False

    def add_columns(self, batch: Batch, request: TeacherRequest) -> Batch:
        """See `Teacher`. The model is in evaluation mode: two passes give the same bits."""
        wanted: dict[Output, bool] = {
            "logprobs": request.logprobs,
            "top_ids": request.top_k > 0,
            "top_logprobs": request.top_k > 0,
            "states": request.states,
        }
        outputs = tuple(name for name, asked in wanted.items() if asked)
        found = self.engine.forward(
            batch.select("tokens", "loss_mask"),
            ForwardRequest(
                outputs,
                request.temperature,
                top_k=request.top_k,
                vocabulary=request.vocabulary,
                adapters=self.adapters,
            ),
        )
        if self.offload:
            self.engine.offload()
        return batch.with_columns(**{f"teacher_{name}": found[name] for name in outputs})
