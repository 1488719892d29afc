"""Extension of vLLM's workers: weight updates, and the version of the weights.

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
from rlcore_vllm.adapters import NUMBER, AdapterReload, begin_with_none
from rlcore_vllm.reload import Reload


class WorkerExtension:
    """Methods for ``collective_rpc``, all named ``rlcore_…``; state is kept in attributes of that prefix.

    Weights arrive in one of three ways:

    - by arguments: `rlcore_begin`, any number of `rlcore_load`, `rlcore_finish`;
    - by a connection of the worker: `rlcore_connect` once, then `rlcore_receive` for every version;
    - by vLLM's transfer: `rlcore_begin_transfer`, any number of `rlcore_take_transfer`, `rlcore_finish_transfer`.

    After an error the model holds a mixture, with which the engine does not generate, and the next update may begin.
    """

    rank: int
    device: torch.device
    model_runner: Any
    vllm_config: Any
    start_weight_update: Callable[[], None]
    update_weights: Callable[[Any], None]

    def rlcore_prepare(self, takes_adapters: bool = False) -> int:
        """Install the log-prob sampler and return this worker's rank. Idempotent.

        Args:
            takes_adapters: updates bring LoRA adapters, not full weights.
        """
        if not hasattr(self, "rlcore_held_version"):
            if self.vllm_config.parallel_config.world_size > 1:
                quirks.forget_shared_memory()
            sampler.install(self.model_runner)
            self.rlcore_held_version = 0
            self.rlcore_receiver: WeightReceiver | None = None
            self.rlcore_reload: Reload | AdapterReload | None = None
            self.rlcore_takes_adapters = takes_adapters
            self.rlcore_adapter = NUMBER
            if takes_adapters:
                begin_with_none(self.model_runner)
        return self.rank

    def rlcore_version(self) -> int:
        """Return the version of this worker's weights."""
        return self.rlcore_held_version

    def rlcore_begin(self) -> None:
        """Begin an update."""
        if self.rlcore_takes_adapters:
            self.rlcore_reload = AdapterReload(self.model_runner, self.rlcore_adapter)
            return
        with self._rlcore_configured():
            self.rlcore_reload = Reload(self.model_runner.get_model(), self.vllm_config.model_config)

    def rlcore_load(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Load one bucket; its memory may be reused afterwards."""
        assert self.rlcore_reload is not None
        with self._rlcore_configured():
            self.rlcore_reload.load(tensors)

    def rlcore_finish(self, version: int) -> None:
        """Make the model compute with the loaded weights, as ``version``."""
        assert self.rlcore_reload is not None
        with self._rlcore_configured():
            self.rlcore_reload.finish()
        self.rlcore_reload = None
        reset_lora = getattr(self.model_runner, "reset_lora_state", None)
        if reset_lora is not None and not self.rlcore_takes_adapters:
            reset_lora()
        self.rlcore_held_version = version

    def rlcore_cancel(self) -> None:
        """Cancel an update; another one may begin."""
        if self.rlcore_reload is not None:
            self.rlcore_reload.cancel()
            self.rlcore_reload = None
            self._weight_update_active = False  # vLLM's flag of an update by its transfer

    def rlcore_begin_transfer(self) -> None:
        """Begin an update by vLLM's weight transfer."""
        self.start_weight_update()
        self.rlcore_reload = Reload(self.model_runner.get_model(), self.vllm_config.model_config, begun=True)

    def rlcore_take_transfer(self, information: Any) -> None:
        """Receive and load one bucket by vLLM's weight transfer; its memory may be reused afterwards."""
        assert isinstance(self.rlcore_reload, Reload)
        with self._rlcore_configured():
            self.update_weights(information)
            self.rlcore_reload.copy_incomplete()

    def rlcore_finish_transfer(self, version: int) -> None:
        """Make the model compute with the received weights, as ``version``; unlike vLLM, check that all arrived."""
        try:
            self.rlcore_finish(version)
        finally:
            self._weight_update_active = False

    def rlcore_connect(self, address: dict[str, Any]) -> None:
        """Connect to the weight sender at ``address``, the fields of an `Address`."""
        if self.rlcore_receiver is not None:
            self.rlcore_receiver.close()
        self.rlcore_receiver = open_receiver(Address(**address), self.rank, device=self.device)

    def rlcore_receive(self) -> str:
        """Receive the next version; return it, or the message of an error, which the sender gets too.

        An error is not raised: vLLM (0.32) reads the error of one worker, and takes those of others for answers to its
        next calls.
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
        """Set vLLM's current configuration, which its layers read; cancel the update on an error."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            try:
                yield
            except BaseException:
                self.rlcore_cancel()
                raise
