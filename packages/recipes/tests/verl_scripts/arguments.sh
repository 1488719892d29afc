#!/usr/bin/env bash
N=$1; shift; python3 -m verl.trainer.main_ppo n=$N count=$# "$@" rest=$1 $@ a"$@"b "$*"
