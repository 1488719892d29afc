#!/usr/bin/env bash
set -x
# a comment \
python3 -m verl.trainer.main_ppo \
    data.x=1\
    data.y=2 \
    data.z=3\
4 # the end
