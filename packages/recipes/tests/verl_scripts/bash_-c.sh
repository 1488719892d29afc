#!/usr/bin/env bash
bash -c "python3 -m verl.trainer.main_ppo data.x='$GIVEN'"
