#!/usr/bin/env bash
cat <<EOF > /dev/null
python3 -m verl.trainer.main_ppo data.x=$GIVEN
EOF
mkdir -p /tmp || exit 1
(A=lost; true)
unset GIVEN
python3 -m verl.trainer.main_ppo a=${A:-kept} g=${GIVEN-gone}
