#!/usr/bin/env bash
# aiperf==0.13.0
# NVIDIA's benchmark: a short run that must find every answer whole.
set -euo pipefail
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
aiperf profile --model tiny --tokenizer "$ROOT/models/tiny" --url "$BASE" --api-key "$KEY" --endpoint-type completions --streaming \
    --concurrency 4 --request-count 12 --synthetic-input-tokens-mean 60 --output-tokens-mean 16 --extra-inputs ignore_eos:true \
    --artifact-dir "$out" --ui none
python3 - "$out" <<'PYTHON'
import json, pathlib, sys
[file] = pathlib.Path(sys.argv[1]).rglob("profile_export_aiperf.json")
figures = json.loads(file.read_text())
assert figures["request_count"]["avg"] == 12, figures["request_count"]
assert not figures.get("error_summary"), figures["error_summary"]
PYTHON
