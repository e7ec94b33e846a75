#!/usr/bin/env bash
# Parquet files in $RAW to a data set in $DATA. Rows are lines of articles; they are joined into
# articles, which begin with a first-level title, " = Title = ".
set -euo pipefail

RAW=${RAW:-wikitext-103}/wikitext-103-raw-v1
evomoe prepare "$RAW" \
  --valid "$RAW"/validation-*.parquet --test "$RAW"/test-*.parquet \
  --document-start '^ = [^=].* = $' \
  --vocab-size 32768 --sample-bytes 50M \
  --source 'WikiText-103, raw (Merity et al. 2016): Wikipedia, CC BY-SA 3.0 and GFDL' \
  --out "${DATA:-data-bin/wikitext103}" \
  "$@"
