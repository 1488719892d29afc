#!/usr/bin/env bash
DATA=(
    data.train_files="$GIVEN"   # with blanks
    data.n=${N:-8}
    'data.truncation=error'
)
DATA+=(data.more="a b")
NO=()
ONE=(x)
python3 -m verl.trainer.main_ppo "${DATA[@]}" ${NO[@]} "${NO[@]}" ${DATA[@]} "all=${ONE[*]}" n=${#DATA[@]} first=${DATA[0]} last=${DATA[-1]} $ONE
