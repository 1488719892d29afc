#!/usr/bin/env bash
# as newer scripts are written: the device is probed, arrays of keys by section, extras by engine
DEVICE=${DEVICE:-$(python3 -c 'import no_such_torch_npu' 2>/dev/null && echo npu || echo gpu)}
set -xeuo pipefail
INFER_BACKEND=${INFER_BACKEND:-vllm}
QUANTIZATION=${QUANTIZATION:-}
NDEVICES=${NDEVICES:-}
n_devices=${NDEVICES:-8}
NAME=qwen_${INFER_BACKEND}${QUANTIZATION:+_${QUANTIZATION}}
EXTRA=(
    model_engine=megatron
    actor_rollout_ref.rollout.bucket=${BUCKET:-4096}
)
case "${DEVICE}" in
    gpu)
        EXTRA+=(
            +actor_rollout_ref.rollout.moe_tp=${MOE_TP:-2}
        )
        ;;
    npu)
        n_devices=16
        ;;
    *)
        echo "Unsupported DEVICE=${DEVICE}." >&2
        exit 1
        ;;
esac
if [ -n "${QUANTIZATION}" ] && [ "${INFER_BACKEND}" != trtllm ]; then
    exit 1
fi
actor_pp=2 ref_pp=1 infer_tp=4
if [ "${infer_tp}" = 4 ] || [ "${infer_tp}" = 2 ]; then
    seqs=${SEQS:-1024}
else
    seqs=${SEQS:-384}
fi
[ "${actor_pp}" -gt 1 ] && actor_vpp=${actor_pp} || actor_vpp=null
[ "${ref_pp}" -gt 1 ] && ref_vpp=${ref_pp} || ref_vpp=null
MODEL=(actor_rollout_ref.model.path="$HOME/model")
if [[ "${DEVICE}" == "npu" && "${USE_TRITON:-auto}" != "false" ]]; then
    MODEL+=(actor_rollout_ref.model.triton=True)
fi
if [ "${QUANTIZATION}" = fp8 ]; then
    for v in $(env | awk -F= '/^(PMI|SLURM)_/{print $1}'); do
        unset "$v"
    done
fi
TRAINER=(
    trainer.logger='["console","wandb"]'
    trainer.experiment_name=${NAME}
    trainer.n_gpus_per_node=${n_devices}
)
start_time=$(date +%Y%m%d)_$(date +%Y)
LAUNCH=(python3)
if [ "${VERL_USE_UV:-0}" != 0 ] && [ "${DEVICE:-gpu}" = gpu ] && { [ "${INFER_BACKEND}" = vllm ] || [ "${INFER_BACKEND}" = sglang ]; }; then
    uv sync
    LAUNCH=(uv run --frozen --no-sync python3)
fi
"${LAUNCH[@]}" -m verl.trainer.main_ppo \
    "${MODEL[@]}" \
    "${TRAINER[@]}" \
    "${EXTRA[@]}" \
    seqs=${seqs} vpp=${actor_vpp} ref=${ref_vpp} \
    "$@" 2>&1 | tee /dev/null
