#!/usr/bin/env bash
# A further node of a Ray cluster. Run it on each other machine, in the same environment (same versions of Python and
# Ray), after copying ~/.ray/auth_token from the head where the home folder is not shared:
#
#     HEAD=10.0.0.1 ADDRESS=10.0.0.2 ./ray_worker.sh
#
# HEAD     address of the machine that runs ray_head.sh
# ADDRESS  this machine's address in the same network
# PORT     of Ray's head (6379)
# TIMEOUT  longest wait for the head, in seconds (300)
set -euo pipefail

: "${HEAD:?the address of the machine that runs ray_head.sh}"
: "${ADDRESS:?the address of this machine in the private network, such as 10.0.0.2}"

export RAY_AUTH_MODE=token

# The head may still be starting.
port=${PORT:-6379}
deadline=$((SECONDS + ${TIMEOUT:-300}))
until (exec 3<>"/dev/tcp/$HEAD/$port") 2>/dev/null; do
    if ((SECONDS >= deadline)); then
        echo "nothing listens at $HEAD:$port after ${TIMEOUT:-300} s: is ray_head.sh running there?" >&2
        exit 1
    fi
    sleep 1
done

exec ray start --block --address "$HEAD:$port" --node-ip-address "$ADDRESS" --disable-usage-stats
