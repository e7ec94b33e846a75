#!/usr/bin/env bash
# Train GPT small with 16 experts in every other layer, on all GPUs of the machine.
# Arguments override the options below; an empty PRECISION means fp32.
set -euo pipefail

fairseq-train "${DATA:-data-bin/openwebtext}" \
  --user-dir evomoe_plugin --task language_modeling --arch transformer_lm_gptsmall_moe \
  --share-decoder-input-output-embed --dropout 0.1 --attention-dropout 0.1 \
  --sample-break-mode none --tokens-per-sample 1024 --batch-size 16 --update-freq 4 \
  --criterion moe_cross_entropy --best-checkpoint-metric ppl \
  --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.1 --clip-norm 5.0 \
  --lr 0.0006 --lr-scheduler polynomial_decay --warmup-updates 5000 \
  --max-update 100000 --total-num-update 100000 \
  --ddp-backend fully_sharded --checkpoint-activations ${PRECISION---fp16} \
  --validate-interval-updates 5000 --save-interval-updates 5000 --keep-interval-updates 2 \
  --no-epoch-checkpoints --save-dir "${CHECKPOINTS:-checkpoints/openwebtext}" \
  --log-format json --log-interval 100 --seed 1234 \
  "$@"
