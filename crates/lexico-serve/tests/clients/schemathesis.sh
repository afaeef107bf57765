#!/usr/bin/env bash
# schemathesis==4.32.5
# Requests made from the OpenAPI document, sound ones and wrong ones: none may be a server's error, and each answer is as the
# document says.
set -euo pipefail
curl --silent --fail --header "Authorization: Bearer $KEY" "$BASE/openapi.json" >"${TMPDIR:-/tmp}/openapi.$$.json"
trap 'rm -f "${TMPDIR:-/tmp}/openapi.$$.json"' EXIT
schemathesis run "${TMPDIR:-/tmp}/openapi.$$.json" --url "$BASE" --header "Authorization: Bearer $KEY" --max-examples 15 --seed 1 \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
    --suppress-health-check all --request-timeout 60
