#!/usr/bin/env bash
# LMCache's server with codes in a folder.
#
#   examples/lmcache-fs.sh dictionary.safetensors /cache
set -euo pipefail
exec python -m lexico.lmcache server --l1-size-gb 2 --eviction-policy LRU --l2-adapter \
    "{\"type\": \"fs\", \"base_path\": \"$2\", \"serde\": {\"type\": \"lexico\", \"dictionary\": \"$1\"}}"
