#!/usr/bin/env bash
torchrun --standalone --nproc_per_node=${1:-8} -m verl.trainer.fsdp_sft_trainer optim.lr=1e-5 > /dev/null
