"""The CPU emulation changes megatron's own modules only, production does not import it, and offloading keeps views."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import torch

from rlcore_megatron import cpu_emulation
from rlcore_megatron.cpu_emulation.code_objects import functions_of
from rlcore_megatron.cpu_emulation.torch_on_cpu import TORCH
from rlcore_megatron.memory import Offloaded

SOURCES = Path(cpu_emulation.__file__).parents[1]


def test_only_functions_that_run_on_the_cpu_import_the_emulation():
    importers = {
        (file.name, node.col_offset > 0)
        for file in SOURCES.rglob("*.py")
        if "cpu_emulation" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "cpu_emulation" in ast.unparse(node)
    }
    inside = {("engine.py", True), ("export.py", True)}
    assert importers == inside, (
        "production must not import the emulation; `build` does so on the CPU, and exports run there"
    )


def test_torch_itself_is_unchanged():
    names = ("zeros", "empty", "tensor", "cuda", "compile", "get_rng_state")
    before = {name: getattr(torch, name) for name in names}
    methods = {name: getattr(torch.Tensor, name) for name in ("cuda", "type", "to")}
    cpu_emulation.install()
    cpu_emulation.install()
    assert cpu_emulation.installed()
    assert all(getattr(torch, name) is value for name, value in before.items())
    assert all(getattr(torch.Tensor, name) is value for name, value in methods.items())
    assert torch.zeros(1).type() == "torch.FloatTensor"
    assert type(torch.cuda) is type(sys)
    assert not any(vars(module).get("torch") is TORCH for name, module in list(sys.modules.items())
                   if not name.startswith(("megatron.", "rlcore_megatron.")))  # fmt: skip


def test_torch_compiles_for_others():
    cpu_emulation.install()

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_megatron_finds_the_cpu_where_it_asks_for_cuda():
    cpu_emulation.install()
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert clip_grads.torch.cuda.current_device() == torch.device("cpu")
    for module in (clip_grads, distrib_optimizer):
        for function in functions_of(module):
            assert "torch.cuda.FloatTensor" not in function.__code__.co_consts


def test_offloaded_tensors_come_back_under_their_views():
    buffer = torch.arange(8.0)
    views = [buffer[:4].view(2, 2), torch.nn.Parameter(buffer[4:])]
    gradient = torch.ones(3)
    offloaded = [Offloaded([*views, buffer]), Offloaded([gradient], keep=False)]
    assert buffer.untyped_storage().nbytes() == gradient.untyped_storage().nbytes() == 0
    for one in offloaded:
        one.restore()
    assert torch.equal(buffer, torch.arange(8.0))
    assert torch.equal(views[0], torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert views[1].data_ptr() == buffer[4:].data_ptr()
    assert not gradient.any()
