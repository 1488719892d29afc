"""Batches in a deterministic, resumable order."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, zip_longest
from typing import Any, Generic, Protocol, TypeVar

from pydantic import Field

from rlcore.batch import Batch
from rlcore.engines.episode import PromptSample
from rlcore.errors import CheckpointError, DataError
from rlcore_kit.checkpoint.json_file import Count, JsonFile
from rlcore_recipes.data.prompts import PromptDataset

T = TypeVar("T")


class LoaderState(JsonFile):
    """The state of a loader in a checkpoint."""

    drawn: Count = Field(description="Batches drawn.")
    ahead: list[Count] = Field([], description="Positions after those that were trained on already.")
    batch_size: int = Field(ge=1, description="Samples of a batch.")
    seed: int = Field(description="Of the order.")
    shuffle: bool = Field(description="Whether the order is random.")
    file_sizes: list[Count] = Field(description="Samples of each file.")
    quotas: list[Count] = Field(description="Samples of each file in an epoch.")
    fingerprints: list[str] = Field([], description="Of what each file holds.")


class Loader(ABC, Generic[T]):
    """Endless batches over samples ``0 … sum(file_sizes) - 1``.

    The order of an epoch is a function of ``(seed, epoch)`` alone, so that the number of batches drawn is the whole
    state. Samples left over at the end of an epoch, too few for a batch, are dropped.

    Args:
        file_sizes: samples per file, which stand one file after another.
        weights: share of each file in an epoch. An epoch keeps its length; a file with a larger share than its size
            is gone through more often, one with a smaller share goes on in the next epoch where it stopped in this.
        fingerprints: of what each file holds; a loader over others cannot be restored.

    Raises:
        DataError: there are fewer samples than one batch takes.
    """

    def __init__(
        self,
        file_sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        fingerprints: Sequence[str] = (),
    ) -> None:
        self.samples = sum(file_sizes)
        if self.samples < batch_size:
            raise DataError(
                f"data.train_batch_size={batch_size} is more than the {self.samples} samples of the train files; "
                "lower it or add data"
            )
        self.batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._sizes = list(file_sizes)
        self._quotas = _quotas(self.samples, weights) if weights is not None else self._sizes
        self._fingerprints = list(fingerprints)
        self._drawn = 0
        self._order: tuple[int, list[int]] | None = None

    described_by = LoaderState

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.samples // self.batch_size

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._drawn // self.steps_per_epoch

    @property
    def drawn(self) -> int:
        """Batches drawn so far, in all epochs."""
        return self._drawn

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        batch = self._batch(self._drawn)
        self._drawn += 1
        return batch

    def _batch(self, number: int) -> T:
        """Return batch ``number`` of the run, which depends on nothing else."""
        epoch, step = divmod(number, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._epoch_order(epoch)
        start = step * self.batch_size
        return self._take(self._order[1][start : start + self.batch_size], number * self.batch_size)

    @abstractmethod
    def _take(self, indices: list[int], position: int) -> T:
        """Return the batch of these samples, the first of which is number ``position`` of the run."""

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON."""
        return {"drawn": self._drawn, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the loader that gave ``state`` stood.

        Raises:
            CheckpointError: it went over other data or in another order.
        """
        changed = {name: value for name, value in self._identity().items() if state.get(name) != value}
        if list(changed) == ["fingerprints"]:
            pairs = zip_longest(state.get("fingerprints") or [], self._fingerprints)
            numbers = ", ".join(str(number) for number, (was, now) in enumerate(pairs, 1) if was != now)
            raise CheckpointError(
                f"the data position cannot be restored: train file {numbers} (of data.train_files) has as many samples "
                "as before but holds others; restore the old file, or start a new run in another trainer.out_dir"
            )
        if changed:
            was = "; ".join(f"{name} was {state.get(name)} and is now {value}" for name, value in changed.items())
            raise CheckpointError(f"the data position cannot be restored: {was}")
        self._drawn = int(state["drawn"])

    def _identity(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "file_sizes": self._sizes,
            "quotas": self._quotas,
            "fingerprints": self._fingerprints,
        }

    def _epoch_order(self, epoch: int) -> list[int]:
        order: list[int] = []
        for file, (size, quota, end) in enumerate(zip(self._sizes, self._quotas, accumulate(self._sizes))):
            # the file's own endless stream of passes, of which this epoch takes its quota
            first, last = epoch * quota, (epoch + 1) * quota
            stream = (
                index for number in range(first // size, -(-last // size)) for index in self._pass(file, size, number)
            )
            offset = first % size
            taken = [index for place, index in zip(range(offset + quota), stream) if place >= offset]
            order += [end - size + index for index in taken]
        if self._shuffle:
            random.Random(f"epoch {self._seed} {epoch}").shuffle(order)
        return order

    def _pass(self, file: int, size: int, number: int) -> list[int]:
        order = list(range(size))
        if self._shuffle:
            random.Random(f"pass {self._seed} {file} {number}").shuffle(order)
        return order


class PromptLoader(Loader[list[PromptSample]]):
    """Batches of prompts, each sample with its ``position`` in the run."""

    def __init__(
        self,
        dataset: PromptDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            dataset.file_sizes,
            batch_size,
            seed=seed,
            shuffle=shuffle,
            weights=weights,
            fingerprints=dataset.fingerprints,
        )
        self.dataset = dataset

    def _take(self, indices: list[int], position: int) -> list[PromptSample]:
        return [replace(self.dataset[index], position=position + place) for place, index in enumerate(indices)]


class Samples(Protocol):
    """What gives samples as a batch: a `Batch`, or `rlcore_recipes.data.sample_data.SampleDataset`."""

    def take(self, indices: list[int], /) -> Batch:
        """Return the samples of these numbers."""


class BatchLoader(Loader[Batch]):
    """Batches of samples, of which a thread reads those of the next steps ahead.

    What was read ahead is no part of the state: a restored loader reads it again.

    Attributes:
        data: what samples are taken from. Before the first batch, one that adds columns to the same samples may take
            its place.
    """

    ahead = 2
    """Batches that are read before they are asked for."""

    def __init__(
        self,
        data: Samples,
        file_sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] | None = None,
        fingerprints: Sequence[str] = (),
    ) -> None:
        super().__init__(file_sizes, batch_size, seed=seed, shuffle=shuffle, weights=weights, fingerprints=fingerprints)
        self.data = data
        self._thread = ThreadPoolExecutor(1, "read-ahead")  # one: batches are made one after another
        self._pending: dict[int, Future[Batch]] = {}

    def __next__(self) -> Batch:
        wanted = range(self._drawn, self._drawn + 1 + self.ahead)
        self._pending = {number: future for number, future in self._pending.items() if number in wanted}
        for number in wanted:
            if number not in self._pending:
                self._pending[number] = self._thread.submit(self._batch, number)
        batch = self._pending.pop(self._drawn).result()
        self._drawn += 1
        return batch

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _take(self, indices: list[int], position: int) -> Batch:
        return self.data.take(indices)


def _quotas(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` divided in proportion to ``weights`` (largest remainder)."""
    exact = [weight * total / sum(weights) for weight in weights]
    quotas = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda file: (quotas[file] - exact[file], file))
    for file in by_remainder[: total - sum(quotas)]:
        quotas[file] += 1
    return quotas
