#!/usr/bin/env bash
set -xeuo pipefail
# as scripts of the SFT trainer are written: the start as text, an engine's keys as text over several lines
NUM_GPUS=${NUM_GPUS:-1}
mode=${mode:-spmd}
if [ "$mode" = "spmd" ]; then
  ENTRYPOINT=${ENTRYPOINT:-"-m verl.trainer.sft_trainer"}
  COMMAND="torchrun --standalone --nnodes=${NNODES:-1} --nproc-per-node=${NUM_GPUS:-1} ${ENTRYPOINT}"
else
  COMMAND="python3 -m verl.trainer.sft_trainer_ray trainer.nnodes=${NNODES:-1}"
fi
DATASET_DIR=${DATASET_DIR:-~/data/gsm8k_sft}
TRAIN_FILES=${DATASET_DIR}/train.parquet
VAL_FILES=~/data/test.parquet
backend=${BACKEND:-fsdp}
ckpts_home=${ckpts_home:-~/verl/test/sft-${backend}}
FSDP_CONFIG="\
    engine=${backend} \
    optim.betas="[0.9,0.95]" \
    optim.lr=1e-5
    engine.fsdp_size=${FSDP_SIZE:-${NUM_GPUS}}"
if [ "$backend" = "fsdp" ]; then
    ENGINE_CONFIG="$FSDP_CONFIG"
    exp_name=gsm8k-${backend}-sp${SP_SIZE:-1}-mode-${mode}
fi
echo torchrun -m verl.trainer.sft_trainer optim.lr=1 in "${ckpts_home}"

$COMMAND \
    data.train_files="${TRAIN_FILES}" \
    data.val_files="${VAL_FILES}" \
    ${ENGINE_CONFIG} \
    trainer.logger=['console','file'] \
    trainer.experiment_name="${exp_name}" \
    trainer.default_local_dir="${ckpts_home}" \

    # trainer.total_training_steps=${TOTAL_TRAIN_STEP} \
    # trainer.max_ckpt_to_keep=1 \

rm -rf "${ckpts_home:?}/no_such_file_*"
