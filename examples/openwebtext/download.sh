#!/usr/bin/env bash
# Download 24 GB of Parquet files and GPT-2's BPE into $RAW; the only step that needs the network.
# `pip install huggingface_hub` installs `hf`. If interrupted, run it again to continue.
set -euo pipefail

RAW=${RAW:-openwebtext}
hf download Skylion007/openwebtext --repo-type dataset --include 'plain_text/*.parquet' \
  --local-dir "$RAW"
for file in encoder.json vocab.bpe; do
  curl --fail --location --continue-at - --output "$RAW/$file" \
    "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/$file"
done
