"""The fields of megatron-core's configuration dataclasses, read from its source: importing it takes ten seconds."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

CLASSES = {
    "transformer": "TransformerConfig",
    "optimizer": "OptimizerConfig",
    "ddp": "DistributedDataParallelConfig",
}
_FILES = {
    "transformer": ("transformer/transformer_config.py", "model_parallel_config.py"),
    "optimizer": ("optimizer/optimizer_config.py",),
    "ddp": ("distributed/distributed_data_parallel_config.py",),
}
_BASES = {"TransformerConfig": "ModelParallelConfig"}


@cache
def names(section: str) -> frozenset[str] | None:
    """Return the fields of ``section``'s dataclass and its base; None if megatron-core is not installed."""
    spec = importlib.util.find_spec("megatron")  # a namespace package: found, not imported
    roots = [Path(root) / "core" for root in spec.submodule_search_locations or ()] if spec else []
    root = next((root for root in roots if root.is_dir()), None)
    if root is None:
        return None
    wanted = {CLASSES[section], _BASES.get(CLASSES[section])}
    return frozenset(
        statement.target.id
        for file in _FILES[section]
        for node in ast.parse((root / file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name in wanted
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
