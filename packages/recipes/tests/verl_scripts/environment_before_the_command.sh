#!/usr/bin/env bash
A=1 B="x y" python3 -m verl.trainer.main_ppo data.x=1 && echo done
