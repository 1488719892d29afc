#!/usr/bin/env bash
# an engine's keys as one text over several lines, and what starts python as an array
backend=${BACKEND:-megatron}
ENTRY=${ENTRY:-"-m verl.trainer.sft_trainer"}
ENGINE="\
    engine=${backend} \
    optim.betas="[0.9,0.95]" \
    optim.lr=1e-5"
LAUNCH=(python3)
if [ "${USE_UV:-1}" != 0 ] && { [ "$backend" = fsdp ] || [ "$backend" = megatron ]; }; then
    uv --no-such-option 2>/dev/null
    LAUNCH=(python3 -u)
fi
"${LAUNCH[@]}" ${ENTRY} \
    ${ENGINE} \
    engine.modules=["core_attn","mlp"] \
    trainer.resume_mode=disable \

    # the end
rm -rf "${backend:?}/no_such_folder_*"
