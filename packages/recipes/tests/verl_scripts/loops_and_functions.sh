#!/usr/bin/env bash
for name in a b "c d"; do LIST+=("x.$name=1"); done
i=0
while [ $i -lt 3 ]; do i=$((i + 1)); [ $i = 2 ] && continue; SEEN+=$i; done
while [[ $# -gt 0 ]]; do case $1 in --n) N=$2; shift 2 ;; *) REST+=("$1"); shift ;; esac; done
start() { local y=$1; shift; python3 -m verl.trainer.main_ppo y=$y "$@"; }
start one "${LIST[@]}" seen=$SEEN n=${N:-none} "${REST[@]}"
