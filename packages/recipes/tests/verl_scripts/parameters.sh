#!/usr/bin/env bash
F=/data/set/train.parquet.gz; L=aXbXc
python3 -m verl.trainer.main_ppo ${F%.*} ${F%%.*} ${F#*/} ${F##*/} ${L/X/-} ${L//X/-} ${L,,} ${L^^} ${#L} ${L:1:2} ${L: -2} ${L/#a/b} ${L/%c/d}
