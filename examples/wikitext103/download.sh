#!/usr/bin/env bash
# The one step that needs the network: 300 MB of Parquet files into $RAW.
# `pip install huggingface_hub` brings the command `hf`.
set -euo pipefail

hf download Salesforce/wikitext --repo-type dataset --include 'wikitext-103-raw-v1/*.parquet' \
  --local-dir "${RAW:-wikitext-103}"
