"""Mixing the data sources of samples by given shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, overload

import numpy as np

from rlcore.errors import DataError
from rlcore_recipes.data.sample_data import SampleDataset

D = TypeVar("D", bound=SampleDataset[Any])


def by_source(dataset: D, shares: Mapping[str, float]) -> tuple[D, list[float]]:
    """Return ``dataset`` with the samples of each source one after another, as `Loader` mixes them, and their shares.

    Its ``file_sizes`` are then sizes of sources.

    Raises:
        DataError: a source has no share, or a share no samples.
    """
    sources = np.array(dataset.sources())
    names, codes = np.unique(sources, return_inverse=True)
    found = [str(name) for name in names]
    if missing := sorted({*found} - {*shares}):
        raise DataError(f"data.mix has no share for the data source {', '.join(missing)}; give every source one")
    if unused := sorted({*shares} - {*found}):
        raise DataError(f"data.mix names {', '.join(unused)}, and the train files have only {', '.join(found)}")
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes).tolist()
    return replace(dataset, samples=_Reordered(dataset.samples, order), file_sizes=sizes), [shares[n] for n in found]


class _Reordered(Sequence[Any]):
    def __init__(self, samples: Sequence[Any], order: np.ndarray[Any, Any]) -> None:
        self._samples = samples
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._samples[int(self._order[index])]
