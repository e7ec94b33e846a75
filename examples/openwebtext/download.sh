#!/usr/bin/env bash
# The one step that needs the network: 24 GB of Parquet files, and GPT-2's BPE, into $RAW.
# `pip install huggingface_hub` brings the command `hf`. Interrupted, it goes on from where it was.
set -euo pipefail

RAW=${RAW:-openwebtext}
hf download Skylion007/openwebtext --repo-type dataset --include 'plain_text/*.parquet' \
  --local-dir "$RAW"
for file in encoder.json vocab.bpe; do
  curl --fail --location --continue-at - --output "$RAW/$file" \
    "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/$file"
done
