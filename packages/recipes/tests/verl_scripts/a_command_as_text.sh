#!/usr/bin/env bash
CMD="python3 -m verl.trainer.main_ppo data.x=1 data.y=[a,b]"
echo "running $CMD"
eval "$CMD"
