#!/usr/bin/env bash
# Download 300 MB of Parquet files into $RAW; the only step that needs the network.
# `pip install huggingface_hub` installs `hf`.
set -euo pipefail

hf download Salesforce/wikitext --repo-type dataset --include 'wikitext-103-raw-v1/*.parquet' \
  --local-dir "${RAW:-wikitext-103}"
