#!/usr/bin/env bash
# Parquet files in $RAW to a data set in $DATA, one document per row; 1 in 2000 is held out for each
# of valid and test. `evomoe prepare` warns if the BPE files are not those of GPT-2.
set -euo pipefail

RAW=${RAW:-openwebtext}
evomoe prepare "$RAW/plain_text" \
  --gpt2-bpe "$RAW/encoder.json" "$RAW/vocab.bpe" \
  --valid-fraction 0.0005 --test-fraction 0.0005 \
  --source 'OpenWebText (Gokaslan and Cohen 2019): the open web; the packaging is CC0' \
  --out "${DATA:-data-bin/openwebtext}" \
  "$@"
