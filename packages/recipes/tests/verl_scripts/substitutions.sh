#!/usr/bin/env bash
NAME=$(basename /a/b/c.sh .sh)_$(dirname /a/b/c)_`echo x  y`
DEVICE=${DEVICE:-$(python3 -c 'import no_such_module_anywhere' 2>/dev/null && echo npu || echo gpu)}
DAY=$(date +%Y)
python3 -m verl.trainer.main_ppo name=$NAME device=$DEVICE day=$DAY p=$(printf '%s-%s' a b) "w=$(cd / && pwd)" s=$(echo "a  b") "x=$(readlink -f /usr/./bin/..)" "y=$(realpath /usr//bin/../lib/.)" "z=$(echo -n a)"
