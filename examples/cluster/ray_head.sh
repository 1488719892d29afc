#!/usr/bin/env bash
# The first node of a Ray cluster. Run it on one machine, in the environment that has rlcore:
#
#     ADDRESS=10.0.0.1 ./ray_head.sh
#
# It stays in the foreground, so that whatever started it (systemd, srun, a terminal) sees it end, and Ctrl-C ends it.
#
# ADDRESS    this machine's address in the cluster's private network, by which the other nodes find it
# PORT       of Ray's head (6379)
# DASHBOARD  port of the dashboard (8265), on loopback only: ssh -L 8265:127.0.0.1:8265 HEAD
#
# Ray (2.60) listens on every interface whatever ADDRESS is, and every client it accepts can run code here: keep its
# ports behind a firewall that admits only the cluster's machines.
set -euo pipefail

: "${ADDRESS:?the address of this machine in the private network, such as 10.0.0.1}"
port=${PORT:-6379}

# A shared secret that every node and the driver need: without one, Ray obeys all who can connect.
export RAY_AUTH_MODE=token
[[ ${RAY_AUTH_TOKEN:-} ]] || ray get-auth-token --generate >/dev/null   # makes ~/.ray/auth_token if there is none

exec ray start --head --block \
    --node-ip-address "$ADDRESS" --port "$port" \
    --include-dashboard true --dashboard-host 127.0.0.1 --dashboard-port "${DASHBOARD:-8265}" \
    --disable-usage-stats
