"""The commands by which vLLM and SGLang serve an exported folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rlcore_recipes.export.source import ADAPTER_CONFIG

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM (0.32) takes as --max-lora-rank."""


def serving_commands(folder: Path) -> list[str]:
    """Return one command for each server, for a folder with a complete policy or with its adapters alone."""
    adapter = folder / ADAPTER_CONFIG
    if not adapter.is_file():
        path = shlex.quote(str(folder))
        return [f"vllm serve {path}", f"python3 -m sglang.launch_server --model-path {path}"]
    values = json.loads(adapter.read_text(encoding="utf-8"))
    base, rank = shlex.quote(values["base_model_name_or_path"]), int(values["r"])
    most = next((one for one in _LORA_RANKS if one >= rank), rank)
    named, sglang = shlex.quote(f"{folder.name}={folder}"), "python3 -m sglang.launch_server"
    return [
        f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {named}",
        f"{sglang} --model-path {base} --enable-lora --max-lora-rank {rank} --lora-paths {named}",
    ]
