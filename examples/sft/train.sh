#!/usr/bin/env bash
# Fine-tune the quickstart's model to write a Python function for a line of English.
# PREPARED is its data folder, MODEL its checkpoint; arguments override the options below.
set -euo pipefail

HERE=$(dirname "${BASH_SOURCE[0]}")
PREPARED=${PREPARED:-quickstart-run/data}
DATA=${DATA:-data-bin/sft}

mkdir -p "$DATA"
cp "$HERE"/{train,valid,test}.jsonl "$PREPARED"/{dict.txt,sentencepiece.model} "$DATA"/

# The model already routes each token to one expert: keep hard routing from the first update.
fairseq-train "$DATA" \
  --user-dir evomoe_plugin --task language_modeling_sft \
  --finetune-from-model "${MODEL:-quickstart-run/checkpoints/checkpoint_best.pt}" \
  --prompt-template '# {}' --response-template '\n{}' \
  --tokens-per-sample 128 --pack-examples --batch-size 4 \
  --arch transformer_lm_gpttiny_moe --share-decoder-input-output-embed \
  --decoder-ffn-embed-dim 256 --moe-expert-ffn-dim 1024 --moe-expert-count 8 \
  --moe-temperature-start 0.1 --moe-temperature-end 0.1 --moe-temperature-updates 0 \
  --moe-hard-updates 0 \
  --criterion moe_cross_entropy --moe-gate-loss-wt 0.01 --best-checkpoint-metric ppl \
  --optimizer adam --clip-norm 1.0 --lr 0.0005 --max-update "${UPDATES:-100}" \
  --validate-interval 5 --save-interval 5 \
  --no-epoch-checkpoints --save-dir "${CHECKPOINTS:-checkpoints/sft}" \
  --log-format json --log-interval 10 --num-workers 0 --seed 1 \
  "$@"
