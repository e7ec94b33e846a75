#!/usr/bin/env bash
# Train a dense-to-sparse MoE GPT fully sharded, with the options of EvoMoE's command line.
#
#   DATA_PATH=data-bin CHECKPOINT_PATH=checkpoints MAX_UPDATES=100000 GPUS=8 \
#     bash examples/pretraining/train.sh [further fairseq-train options]
#
# Under mpirun, with one process per node, the node's rank is read from OpenMPI's variables.
set -euo pipefail

: "${DATA_PATH:?a folder written by \`evomoe prepare\`}"
: "${CHECKPOINT_PATH:?folder for checkpoints}"
: "${MAX_UPDATES:?number of updates}"
GPUS=${GPUS:-1}
NODES=${OMPI_COMM_WORLD_SIZE:-1}
NODE=${OMPI_COMM_WORLD_RANK:-0}
CHECKPOINT_FREQUENCY=${CHECKPOINT_FREQUENCY:-1000}

fairseq-train --user-dir evomoe_plugin \
  --distributed-world-size $((GPUS * NODES)) --distributed-rank $((GPUS * NODE)) \
  --distributed-init-method "tcp://${MASTER_IP:-localhost}:${MASTER_PORT:-29500}" \
  "$DATA_PATH" \
  --task language_modeling \
  --arch transformer_lm_gptxl_moe \
  --share-decoder-input-output-embed \
  --tokens-per-sample "${TOKENS_PER_SAMPLE:-1024}" --batch-size "${BATCH_SIZE:-4}" \
  --update-freq "${UPDATE_FREQ:-1}" \
  --lr "${LR:-0.0003}" --lr-scheduler polynomial_decay --warmup-updates "${WARMUP_STEPS:-3000}" \
  --optimizer adam --adam-betas '(0.9, 0.98)' --adam-eps 1e-08 \
  --clip-norm 5.0 --weight-decay 0.1 --dropout 0.1 \
  --criterion "${CRITERION:-cross_entropy}" \
  --write-checkpoints-asynchronously \
  --save-dir "$CHECKPOINT_PATH" \
  --save-interval-updates "$CHECKPOINT_FREQUENCY" \
  --num-workers "${NUM_WORKERS:-2}" \
  --ddp-backend fully_sharded \
  --checkpoint-activations \
  --max-update "$MAX_UPDATES" \
  --total-num-update "$MAX_UPDATES" \
  --validate-interval-updates "$CHECKPOINT_FREQUENCY" \
  --log-format json --log-interval "${LOG_INTERVAL:-100}" \
  --symlink \
  --seed 1234 \
  "$@" 2>&1 | tee -a "${LOG_PATH:-train.log}"
