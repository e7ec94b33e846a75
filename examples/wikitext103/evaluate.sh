#!/usr/bin/env bash
# Perplexity per token on the test split, each with at least 256 tokens of context if available.
set -euo pipefail

fairseq-eval-lm "${DATA:-data-bin/wikitext103}" \
  --user-dir evomoe_plugin --task language_modeling --gen-subset test \
  --path "${CHECKPOINTS:-checkpoints/wikitext103}/checkpoint_best.pt" \
  --sample-break-mode none --tokens-per-sample 512 --context-window 256 --batch-size 8 \
  "$@"
