"""SGLang's sampling backend ``rlcore``: every request samples from its seed. Runs in the server's processes.

SGLang 0.5 uses seeds only under ``--enable-deterministic-inference``, which slows every kernel down, forbids its prefix
cache with most attention backends, and ends the server at a request with min-p. The result of this sampler depends only
on the request's seed, the token's position and the distribution: it needs no custom kernel, and tensor-parallel ranks
agree without communication. SGLang finds `register` by its entry-point group ``sglang.srt.plugins``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "rlcore"
"""The value of ``--sampling-backend``."""

_GOLDEN = -0x61C8864680B583EB  # 2**64 / the golden ratio, as a signed number


def register() -> None:
    """Register the backend with SGLang; a server that uses another backend is not changed."""
    from sglang.srt.layers.sampler import register_sampler_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    register_sampler_backend(NAME, _build)
    HookRegistry.register("sglang.srt.layers.sampler.create_sampler", _create, HookType.AROUND)
    batch = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo"
    HookRegistry.register(f"{batch}.from_schedule_batch", _with_seeds, HookType.AFTER)


def _asked_for() -> bool:
    """Return whether the server uses this backend; on the CPU SGLang (0.5) calls every backend "pytorch"."""
    from sglang.srt.runtime_context import get_server_args

    return bool(get_server_args().sampling_backend == NAME)


def _create(original: Any, *args: Any, **kwargs: Any) -> Any:
    return _build() if _asked_for() else original(*args, **kwargs)


def _with_seeds(info: Any, _cls: type, batch: Any, *_: Any, **__: Any) -> Any:
    """Pass the requests' seeds on, which SGLang (0.5) does for deterministic inference only."""
    import torch

    if _asked_for():
        seeds = [request.sampling_params.sampling_seed or 0 for request in batch.reqs]
        info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return info


def _build() -> Any:
    from sglang.srt.layers.sampler import Sampler

    class SeededSampler(Sampler):  # type: ignore[misc]
        """Samples by seed; log-probs are under softmax(logits / temperature), before top-k, top-p and min-p."""

        def forward(
            self,
            logits_output: Any,
            sampling_info: Any,
            return_logprob: bool,
            top_logprobs_nums: list[int],
            token_ids_logprobs: list[list[int]],
            positions: torch.Tensor,
        ) -> torch.Tensor:
            """Sample one token per row; see SGLang's ``Sampler``."""
            logits: torch.Tensor = self._preprocess_logits(logits_output.next_token_logits, sampling_info).float()
            if not sampling_info.is_all_greedy:
                logits = logits / sampling_info.temperatures
            logprobs = logits.log_softmax(-1)
            if sampling_info.is_all_greedy:
                tokens = logits.argmax(-1)
            else:
                tokens = draw(logprobs.exp(), sampling_info, positions)
            if return_logprob:
                self.output_logprob_processor.compute_logprobs(
                    logprobs, top_logprobs_nums, token_ids_logprobs, tokens
                ).write_output_to(logits_output)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

    return SeededSampler()


def draw(probs: torch.Tensor, wanted: Any, positions: torch.Tensor) -> torch.Tensor:
    """Sample a token per row by inverting the row's distribution function at a random number of the row.

    Args:
        probs: ``[B, V]`` float32.
        wanted: has ``top_ks``, ``top_ps``, ``min_ps`` and ``sampling_seed``, all ``[B]``, and ``need_top_k_sampling`` …
            for whether any row filters.
        positions: ``[B]``, number of preceding tokens; the same seed gives another random number at each.

    Returns:
        ``[B]`` int64.
    """
    import torch

    if wanted.need_top_k_sampling or wanted.need_top_p_sampling or wanted.need_min_p_sampling:
        probs = filtered(probs, wanted.top_ks, wanted.top_ps, wanted.min_ps)
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    points = uniform(wanted.sampling_seed, positions) * cumulative[:, -1]
    chosen: torch.Tensor = torch.searchsorted(cumulative, points[:, None], right=True)[:, 0]
    return chosen


def filtered(probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Return ``probs`` ``[B, V]`` with zeros for tokens that top-k, then top-p of the rest, then min-p exclude.

    Rows without filters are returned bit by bit, so that a request's tokens do not depend on filters of others.
    """
    import torch

    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    ranked = torch.where(ranks < top_ks[:, None], ranked, 0)
    before = ranked.cumsum(-1, dtype=torch.float64) - ranked
    inside = before < top_ps[:, None] * ranked.sum(-1, keepdim=True, dtype=torch.float64)
    kept = (inside | (top_ps[:, None] >= 1)) & (ranked >= min_ps[:, None] * ranked[:, :1])
    kept[:, 0] = True
    return torch.zeros_like(probs).scatter(-1, order, torch.where(kept, ranked, 0))


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return ``[B]`` float64 numbers in [0, 1) for ``[B]`` int64 seeds and positions.

    SplitMix64 (Steele et al., 2014).
    """
    mixed = _mixed(_mixed(seeds + _GOLDEN) + (positions.long() + 1) * _GOLDEN)  # shift allowed: a counter
    return _shifted(mixed, 11).double() * 2.0**-53


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift ``x`` right by ``bits`` and fill with zeros; torch's shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
