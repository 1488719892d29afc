"""Estimates of the memory that a training step takes (`rlcore.engines.step_memory.StepMemory`), and the free memory.

The estimates follow from the shape of a decoder. With hidden width h, queries q and keys k (heads times head width), an
MLP of width f and s bytes per number, a layer keeps for each token::

    s · (4h + 4q + 3k + 4f) + 4 · (2h + q + k)

The second part is what normalisations keep in fp32. One layer more covers what the backward pass has in flight. With
recomputation of layers only the inputs of each (s · h) and the activations of two layers exist; without a backward pass
only those of one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def activation_bytes(
    config: Any, itemsize: int, *, trained: bool, recompute: bool = False, tensor_parallel: int = 1
) -> int:
    """Estimate the bytes per token (``per_token``) of a model.

    Args:
        config: of transformers.
        itemsize: bytes per number in forward and backward.
        recompute: layers are computed again in the backward pass.
        tensor_parallel: processes that share a layer's heads and MLP.
    """
    text = config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    queries = heads * width // tensor_parallel
    keys = int(getattr(text, "num_key_value_heads", None) or heads) * width // tensor_parallel
    inner, copies = _mlp(text)
    rows = 4 * hidden + 2 * copies * hidden + 4 * queries + 3 * keys + 4 * inner // tensor_parallel
    layer = itemsize * rows + 4 * (2 * hidden + queries + keys)
    if not trained:
        return layer
    return 2 * layer + layers * itemsize * hidden if recompute else (layers + 1) * layer


def _mlp(text: Any) -> tuple[int, int]:
    """Return the width of the MLP that a token passes, and the copies of its hidden state that a router makes."""
    active = getattr(text, "num_experts_per_tok", None)
    if not active:
        return getattr(text, "intermediate_size", None) or 4 * text.hidden_size, 0
    expert = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return active * expert + shared, active


def logits_bytes(config: Any, chunk: int, *, trained: bool) -> int:
    """Estimate the bytes of the vocabulary projection: four fp32 copies of ``chunk`` rows of logits, its gradient."""
    text = config.get_text_config()
    vocabulary, hidden = int(text.vocab_size), int(text.hidden_size)
    return 16 * chunk * vocabulary + (8 * vocabulary * hidden if trained else 0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated on ``device``, the allocator's own reserve included.

    On the CPU: the minimum of what the machine and the control groups of this process have left; half of the machine's
    memory if the system has no ``/proc``.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    try:
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except FileNotFoundError:  # not Linux: half of what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert available is not None
    return min([int(available[1]) * 1024, *_left_in_groups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))])


def place_of(device: torch.device) -> str:
    """Return a name for the memory behind ``device``; processes that share it get the same one."""
    host = socket.gethostname()
    return host if device.type == "cpu" else f"{host}/{torch.cuda.get_device_properties(device).uuid}"


def _left_in_groups(root: Path, membership: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process that limits its memory, version 1 or 2."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = base / path.strip("/")
        for folder in [group, *group.parents]:
            if folder.is_relative_to(base):
                yield from _left(folder, limit, usage, cache)


def _left(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        found = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # no such controller, or a container that sees only its own part of the tree
        return
    if most != "max":
        yield max(int(most) - used + (int(found[1]) if found else 0), 0)
