#!/usr/bin/env bash
P=$((1024 * 2)); R=$(( (P + 1) * 3 / 2 - -7 % 4 )); S=$((2**10 >> 2 | 1)); T=$(( P > 3 && !0 ))
python3 -m verl.trainer.main_ppo p=$P r=$R s=$S t=$T u=$((P+R)) v=$(($P * ${R})) w=$((-7 / 2))
