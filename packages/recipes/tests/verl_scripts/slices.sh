#!/usr/bin/env bash
A=(a "b c" d)
X=${NOT_SET:-~/verl/x-${A}}
NONE=()
python3 -m verl.trainer.main_ppo "${@:2}" ${A[@]:1} "${A[@]:0:2}" ${@:1:1} $X "${NOT_SET:-~/y}" ${NONE[@]:-none} "${A[@]+some}"
