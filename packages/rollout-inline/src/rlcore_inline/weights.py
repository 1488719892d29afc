"""A copy of the model for an inline rollout without a training engine in its process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import starmap
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from rlcore.engines import ModelSettings
from rlcore.engines.weight_bucket import WeightBucket
from rlcore.errors import EngineError
from rlcore_inline.settings import InlineSettings
from rlcore_kit.model_folder.loading import load_model, read_config
from rlcore_kit.model_folder.tensor_names import FromModelFiles
from rlcore_kit.training.device import choose_device

MAX_NAMED = 3
"""Maximum number of missing parameters that an error names."""


class ModelCopy:
    """A `WeightLender` that is no training engine: a copy of the model in this process, without data parallelism.

    Raises:
        EngineError: the model cannot be loaded.
    """

    dp_rank, dp_size = 0, 1

    def __init__(self, model: ModelSettings, settings: InlineSettings) -> None:
        self.device = choose_device(settings.device)
        dtype = settings.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        loaded = load_model(model, read_config(model), "policy", getattr(torch, dtype), 0, "sdpa")
        self.model: Any = cast(Any, loaded).to(self.device)  # Any, because transformers' types of `to` are wrong
        self.model.requires_grad_(False)
        self.step_count = 0
        self._complete = True

    @contextmanager
    def generation_weights(self) -> Iterator[PreTrainedModel]:
        """Return the model, on the device, as `WeightLender.generation_weights` does.

        Raises:
            EngineError: the last weight update failed midway.
        """
        if not self._complete:
            raise EngineError("the last weight update failed midway; send all weights again before generating")
        self.model.to(self.device)
        yield self.model

    @torch.no_grad()
    def load(self, buckets: Iterable[WeightBucket]) -> None:
        """Copy full tensors, named as in model files, into the model; tied weights may have any of their names.

        The caller must not generate meanwhile, nor after an error until a later call succeeds.

        Raises:
            EngineError: a tensor has a name that the model does not have or another shape, or parameters are missing.
        """
        own = self.model.state_dict(keep_vars=True)
        came: set[int] = set()
        from_files = FromModelFiles(self.model)
        for bucket in buckets:
            for name, tensor in filter(None, starmap(from_files.add, bucket.tensors)):
                target = own.get(name)
                if target is None:
                    raise EngineError(
                        f"the weight update holds {name}, which {type(self.model).__name__} does not have"
                    )
                if target.shape != tensor.shape:
                    raise EngineError(
                        f"the weight update holds {name} of shape {list(tensor.shape)}, but the rollout's model has "
                        f"{list(target.shape)} there"
                    )
                self._complete = False  # only now: a stream that fails before its first tensor does no harm
                target.copy_(tensor)
                came.add(id(target))
            if self.device.type == "cuda":  # the sender may reuse the bucket's memory
                torch.cuda.synchronize(self.device)
        missing = [name for name, parameter in self.model.named_parameters() if id(parameter) not in came]
        if missing:
            named = ", ".join(missing[:MAX_NAMED]) + (", …" if len(missing) > MAX_NAMED else "")
            raise EngineError(
                f"the weight update lacks {len(missing)} of {len(list(self.model.parameters()))} parameters: {named}"
            )
        self._complete = True
        self.step_count += 1

    def offload(self) -> None:
        """Move the model to host memory until `generation_weights`."""
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()
