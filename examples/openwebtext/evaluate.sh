#!/usr/bin/env bash
# Perplexity per token on the test split.
set -euo pipefail

fairseq-eval-lm "${DATA:-data-bin/openwebtext}" \
  --user-dir evomoe_plugin --task language_modeling --gen-subset test \
  --path "${CHECKPOINTS:-checkpoints/openwebtext}/checkpoint_best.pt" \
  --sample-break-mode none --tokens-per-sample 1024 --batch-size 8 \
  "$@"
