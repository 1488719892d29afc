#!/usr/bin/env bash
ARGS="data.x=1  data.y=2"
MORE=' data.z=3 '
python3 -m verl.trainer.main_ppo $ARGS a$MORE"b" "$ARGS" ${NONE:-} "${NONE:-}"
