#!/usr/bin/env bash
# The management routes with curl. usage: SAFELORA_KEY=... examples/curl.sh ADAPTER_FOLDER [URL] [NAME]
set -euo pipefail
adapter=$1 url=${2:-http://localhost:8000} name=${3:-mine} # a tenant's name is TENANT/NAME
: "${SAFELORA_KEY:?set it to an admin's or a tenant's key}"
key=(-H "Authorization: Bearer $SAFELORA_KEY")

# Upload both files; or one archive: -F archive=@adapter.tar.gz
curl -sS "${key[@]}" "$url/v1/adapters" -F "name=$name" \
  -F "adapter_config.json=@$adapter/adapter_config.json" \
  -F "adapter_model.safetensors=@$adapter/adapter_model.safetensors" | cut -c 1-400; echo

# Use it: the OpenAI API, with the adapter's name as the model.
curl -sS "${key[@]}" "$url/v1/completions" -H 'Content-Type: application/json' \
  -d "{\"model\": \"$name\", \"prompt\": \"Hello\", \"max_tokens\": 8}"; echo

# What is served, which versions there are, and back to the first one.
curl -sS "${key[@]}" "$url/v1/models" | cut -c 1-400; echo
curl -sS "${key[@]}" "$url/v1/adapters/$name/versions"; echo
curl -sS "${key[@]}" "$url/v1/adapters/$name/rollback" -H 'Content-Type: application/json' \
  -d '{"version": 1}' | cut -c 1-200; echo

# Gone: from every API server, from the workers, from the metrics.
curl -sS "${key[@]}" -X DELETE "$url/v1/adapters/$name"; echo
