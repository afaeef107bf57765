#!/usr/bin/env bash
# LMCache's server with codes in S3; credentials come from the environment.
#
#   examples/lmcache-s3.sh dictionary.safetensors BUCKET REGION
set -euo pipefail
exec python -m lexico.lmcache server --l1-size-gb 2 --eviction-policy LRU --l2-adapter \
    "{\"type\": \"s3\", \"s3_endpoint\": \"s3://$2.s3.$3.amazonaws.com\", \"s3_region\": \"$3\", \
\"serde\": {\"type\": \"lexico\", \"dictionary\": \"$1\"}}"
