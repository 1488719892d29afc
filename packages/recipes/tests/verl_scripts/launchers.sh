#!/usr/bin/env bash
ray job submit --address="http://x:8265" --runtime-env-json='{"a": 1}' --no-wait -- \
    env A=b nohup python3 -u -m verl.trainer.main_ppo data.x=1 "$@" 2>&1 | tee log_$(date +%s).txt
