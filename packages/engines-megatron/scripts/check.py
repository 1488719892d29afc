"""Check that the engine computes what transformers computes, in one layout on this machine.

    torchrun --nproc-per-node 4 scripts/check.py --model MODEL tensor_parallel=2 pipeline_parallel=2

Prints, on rank 0, the largest difference of a log-prob from that of transformers (in fp32 on the CPU), the gradient
norm, the mean change of log-probs by one step, and the peak memory. Exits with 1 if log-probs differ by more than
``--atol``. With ``device=cpu`` a layout runs on a laptop.
"""

from __future__ import annotations

import argparse
import sys

import torch
import yaml
from transformers import AutoModelForCausalLM

from rlcore.batch import Batch, Jagged
from rlcore.engines import ForwardRequest, ModelSettings, OptimSettings, TrainEngineSpec
from rlcore_kit.testing.train_engine import WeightedLogprobs, reference_outputs
from rlcore_megatron.engine import build
from rlcore_megatron.settings import MegatronSettings

LENGTHS = (5, 300, 17, 2, 120, 64, 1, 9)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--atol", type=float, default=0.1, help="0.1 suits bfloat16, 1e-4 float32")
    parser.add_argument("options", nargs="*", help="settings of the engine, as key=value")
    arguments = parser.parse_args()
    options = {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in arguments.options)}
    spec = TrainEngineSpec(
        ModelSettings(path=arguments.model), MegatronSettings(**options), optim=OptimSettings(lr=1e-5), max_tokens=256
    )
    engine = build(spec)
    generator = torch.Generator().manual_seed(0)
    size = engine.hf_config.vocab_size
    tokens = [torch.randint(0, size, (length,), generator=generator) for length in LENGTHS]
    batch = Batch(
        {
            "tokens": Jagged.from_list(tokens),
            "loss_mask": Jagged.from_list([torch.ones(len(row)) for row in tokens]),
            "weights": Jagged.from_list([torch.randn(len(row), generator=generator) for row in tokens]),
        }
    )
    mine = batch.take(batch.partition(engine.dp_size)[engine.dp_rank])
    before = engine.forward(mine, ForwardRequest())
    model = AutoModelForCausalLM.from_pretrained(engine.folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.cat([reference_outputs(model, row["tokens"])[0] for row in mine.rows()])
    difference = float((before.flat("logprobs") - expected).abs().max())
    metrics = engine.train(mine, WeightedLogprobs()).to_dict()
    moved = float((engine.forward(mine, ForwardRequest()).flat("logprobs") - before.flat("logprobs")).abs().mean())
    if engine.parallel.rank == 0:
        print(f"log-probs differ from transformers' by {difference:.2g} at most")
        print(f"gradient norm {metrics['grad_norm']:.4g}, skipped steps {metrics['skipped_steps']:.0f}")
        print(f"one step moves log-probs by {moved:.2g} on average")
        if engine.device.type == "cuda":
            print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    engine.close()
    return int(not difference < arguments.atol)


if __name__ == "__main__":
    sys.exit(main())
