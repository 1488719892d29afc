#!/usr/bin/env bash
set -euxo pipefail
ulimit -c 0
project_name='DAPO'
exp_name='DAPO-Qwen2.5-32B'
clip_ratio_low=3e-4
enable_overlong_buffer=True
train_prompt_bsz=512
gen_prompt_bsz=$((train_prompt_bsz * 3))
loss_agg_mode="token-mean"
# Ray
RAY_ADDRESS=${RAY_ADDRESS:-"http://localhost:8265"}
WORKING_DIR=${WORKING_DIR:-"${PWD}"}
RUNTIME_ENV=${RUNTIME_ENV:-"${WORKING_DIR}/verl/trainer/runtime_env.yaml"}
NNODES=${NNODES:-16}
RAY_DATA_HOME=${RAY_DATA_HOME:-"${HOME}/verl"}
CKPTS_DIR=${CKPTS_DIR:-"${RAY_DATA_HOME}/ckpts/${project_name}/${exp_name}"}
TRAIN_FILE="['$RAY_DATA_HOME/a.parquet', '$RAY_DATA_HOME/b.parquet']"
export MASTER_PORT=$((RANDOM % 10000 + 30000))
PROJECT_DIR="$(pwd)"
output_file="$(pwd)/output.txt"
if [ "${CUSTOM:-False}" = "True" ]; then
    cat <<EOF > "$output_file"
def ${project_name}(x):
    return 0.1
EOF
fi
top_k=-1 # 0 for HF rollout, -1 for vLLM rollout
verl_args=()
if [ ${ENGINE:-fsdp} == "fsdp" ]; then
    verl_args=(
        ${verl_args[@]}
        actor_rollout_ref.actor.grad_clip=1.0
    )
elif [ ${ENGINE:-fsdp} == "megatron" ]; then
    verl_args=(${verl_args[@]} --config-name='ppo_megatron_trainer.yaml')
fi
verl_args=(
    ${verl_args[@]}
    data.truncation='left'
    +actor_rollout_ref.model.override_config.attention_dropout=0.
)
echo verl_args: ${verl_args[@]}
ray job submit --no-wait --runtime-env="${RUNTIME_ENV}" \
    --address "${RAY_ADDRESS}" \
    --working-dir "${WORKING_DIR}" \
    -- python3 -m verl.trainer.main_ppo \
    data.train_files="${TRAIN_FILE}" \
    actor_rollout_ref.actor.clip_ratio_low=${clip_ratio_low} \
    actor_rollout_ref.rollout.top_k="${top_k}" \
    data.gen_batch_size=${gen_prompt_bsz} \
    reward_model.model.path=org/Some-RM-v0.1\
    trainer.project_name="${project_name}" \
    trainer.nnodes="${NNODES}" \
    trainer.default_local_dir="${CKPTS_DIR}" \
    ${verl_args[@]} "${@:2}" \
    | cat
if [ "${CUSTOM:-False}" = "True" ]; then
    check_exit_code=$?
    exit $check_exit_code
fi
