"""What rlcore adds to vLLM's workers: they take weights, and say which version they hold.

vLLM makes this class a base of its worker class (``worker_extension_cls``) and calls its methods by name, with plain
data as arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlcore_kit.weight_transfer import Address, WeightReceiver, open_receiver
from rlcore_vllm import quirks, sampler
from rlcore_vllm.adapters import AdapterReload, begin_with_none
from rlcore_vllm.reload import Reload


class WorkerExtension:
    """Methods for ``collective_rpc``, all named ``rlcore_…``; state is kept in attributes of that prefix.

    Weights come bucket by bucket: `rlcore_begin`, any number of `rlcore_load`, `rlcore_finish`; or all by a connection
    of the worker's own: `rlcore_connect` once, then `rlcore_receive` for every version; or by vLLM's own transfer:
    `rlcore_begin_transfer`, any number of `rlcore_take_transfer`, `rlcore_finish_transfer`. After an error the model
    holds a mixture, which the engine does not generate with, and the next update may begin.
    """

    rank: int
    device: torch.device
    model_runner: Any
    vllm_config: Any
    start_weight_update: Callable[[], None]
    update_weights: Callable[[Any], None]

    def rlcore_prepare(self, takes_adapters: bool = False) -> int:
        """Have contractual log-probs; the number of this worker among all. Once is enough, again changes nothing.

        Args:
            takes_adapters: updates bring adapters, not whole weights.
        """
        if not hasattr(self, "rlcore_held_version"):
            if self.vllm_config.parallel_config.world_size > 1:
                quirks.forget_shared_memory()
            sampler.install(self.model_runner)
            self.rlcore_held_version = 0
            self.rlcore_receiver: WeightReceiver | None = None
            self.rlcore_reload: Reload | AdapterReload | None = None
            self.rlcore_takes_adapters = takes_adapters
            if takes_adapters:
                begin_with_none(self.model_runner)
        return self.rank

    def rlcore_version(self) -> int:
        """The version of the weights that this worker computes with."""
        return self.rlcore_held_version

    def rlcore_begin(self) -> None:
        if self.rlcore_takes_adapters:
            self.rlcore_reload = AdapterReload(self.model_runner)
            return
        with self._rlcore_configured():
            self.rlcore_reload = Reload(self.model_runner.get_model(), self.vllm_config.model_config)

    def rlcore_load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load one bucket; nothing of its memory is needed afterwards."""
        assert self.rlcore_reload is not None
        with self._rlcore_configured():
            self.rlcore_reload.load(tensors)

    def rlcore_finish(self, version: int) -> None:
        """Compute with what was loaded, as ``version``."""
        assert self.rlcore_reload is not None
        with self._rlcore_configured():
            self.rlcore_reload.finish()
        self.rlcore_reload = None
        reset_lora = getattr(self.model_runner, "reset_lora_state", None)
        if reset_lora is not None and not self.rlcore_takes_adapters:
            reset_lora()
        self.rlcore_held_version = version

    def rlcore_cancel(self) -> None:
        """Give up an update that was begun; another one may begin."""
        if self.rlcore_reload is not None:
            self.rlcore_reload.cancel()
            self.rlcore_reload = None
            self._weight_update_active = False  # vLLM's note of an update by its own transfer

    def rlcore_begin_transfer(self) -> None:
        self.start_weight_update()
        self.rlcore_reload = Reload(self.model_runner.get_model(), self.vllm_config.model_config, begun=True)

    def rlcore_take_transfer(self, information: Any) -> None:
        """Load one bucket that vLLM's weight-transfer engine moves; nothing of its memory is needed afterwards."""
        assert isinstance(self.rlcore_reload, Reload)
        with self._rlcore_configured():
            self.update_weights(information)
            self.rlcore_reload.keep_what_waits()

    def rlcore_finish_transfer(self, version: int) -> None:
        """Compute with what was transferred, as ``version``. That all of it is there vLLM itself does not look at."""
        try:
            self.rlcore_finish(version)
        finally:
            self._weight_update_active = False

    def rlcore_connect(self, address: dict[str, Any]) -> None:
        """Connect to the front-end's weight sender, whose address comes as the fields of an `Address`."""
        if self.rlcore_receiver is not None:
            self.rlcore_receiver.close()
        self.rlcore_receiver = open_receiver(Address(**address), self.rank, device=self.device)

    def rlcore_receive(self) -> str:
        """Take the next version from the sender, which learns of an error too; the version, or what went wrong.

        An error is not raised: of several workers' errors vLLM (0.32) reads one, and takes the others for answers to
        its next calls.
        """
        receiver = self.rlcore_receiver
        assert receiver is not None
        try:
            buckets = receiver.receive()
            self.rlcore_begin()
            for bucket in buckets:
                self.rlcore_load(bucket.tensors)
                del bucket
            self.rlcore_finish(receiver.version)
        except Exception as error:
            self.rlcore_cancel()
            receiver.abort(error)
            return str(error) or type(error).__name__
        return str(receiver.version)

    @contextmanager
    def _rlcore_configured(self) -> Iterator[None]:
        """vLLM's layers look at the configuration of the moment; an error takes the update back."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            try:
                yield
            except BaseException:
                self.rlcore_cancel()
                raise
