#!/usr/bin/env bash
# as scripts for Megatron are written: chains of defaults, lists without quotes, names from a model's name
set -xeuo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1 # for overlap
NUM_GPUS=${NUM_GPUS:-8}
MODEL_ID=${MODEL_ID:-Qwen/Qwen2.5-0.5B}
MODEL_PATH=${MODEL_PATH:-${HOME}/models/${MODEL_ID}}
#huggingface-cli download "${MODEL_ID}" --local-dir "${MODEL_PATH}"
USE_DUMMY=${USE_DUMMY:-False}
if [ "$USE_DUMMY" = "True" ]; then
    if [ -z "${DUMMY_CONFIG}"  ]; then
        echo "[ERROR] DUMMY_CONFIG not set"
        exit 1
    fi
    python scripts/init.py --config "${DUMMY_CONFIG}"
fi
TEST_FREQ=${TEST_FREQ:--1}
micro=${MICRO_BSZ:-2} # b
traj=$((micro * NUM_GPUS)) # b * n
mini=$((traj * 2))
LORA_RANK=${LORA_RANK:-0}
LORA_ALPHA=${LORA_ALPHA:-${LORA_RANK}}
TARGETS=${TARGETS:-"['linear_qkv','linear_proj']"}
ALL_OFFLOAD=${ALL_OFFLOAD:-False}
COMMON_OFFLOAD=${COMMON_OFFLOAD:-$ALL_OFFLOAD}
CONTENTS=['model','hf_model','extra']
SKIP=${SKIP:-0}
if [ $SKIP -eq 1 ]; then
    CONTENTS=['model','extra']
fi
exp_name="$(basename "${MODEL_ID,,}")-megatron"
STEPS=${STEPS:-[1]}
RANKS=${RANKS:-[0,1,2]}
LAYOUT=${LAYOUT:-"Et*6|t*6|t*5L"}
max_prompt_length=$((1024 * 2))
max_response_length=$((1204 * 8))
tokens=$(((max_prompt_length + max_response_length) * 10 / 10))

python3 -m verl.trainer.main_ppo --config-path=config \
    --config-name='ppo_megatron_trainer.yaml'\
    data.train_files="${HOME}/train.parquet" \
    data.truncation='left' \
    actor_rollout_ref.model.path="${MODEL_PATH}" \
    actor_rollout_ref.model.lora.rank=${LORA_RANK} \
    actor_rollout_ref.model.lora.alpha=${LORA_ALPHA} \
    actor_rollout_ref.model.lora.target_modules=${TARGETS} \
    actor_rollout_ref.actor.ppo_mini_batch_size=${mini} \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=${tokens} \
    actor_rollout_ref.actor.megatron.param_offload=${COMMON_OFFLOAD} \
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_modules=["core_attn","moe_act"] \
    "++actor_rollout_ref.actor.megatron.override_transformer_config.layout='${LAYOUT}'" \
    actor_rollout_ref.actor.checkpoint.save_contents=$CONTENTS \
    actor_rollout_ref.actor.profiler.ranks=$RANKS \
    +actor_rollout_ref.rollout.max_num_batched_tokens=$((max_prompt_length + max_response_length)) \
    actor_rollout_ref.rollout.max_len=$(( 2 * max_prompt_length )) \
    custom_reward_function.path="${HOME}/reward.py"\
    custom_reward_function.name="score"\
    trainer.experiment_name="${exp_name}" \
    trainer.test_freq="${TEST_FREQ}" \
    global_profiler.steps=$STEPS $@
    
