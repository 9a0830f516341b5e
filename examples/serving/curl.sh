#!/bin/sh
# Draw, edit, ask and reconstruct with curl, against a server started by `unilip serve`.
#
# sh examples/serving/curl.sh [URL [KEY]]
set -eu
url=${1:-http://127.0.0.1:8000}
key=${2:-none}
take() { python3 -c 'import base64, json, sys
sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'; }

curl -fsS "$url/v1/images/generations" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
  -d '{"prompt": "three yellow stars", "seed": 7}' | take > curl-stars.png

curl -fsS "$url/v1/images/edits" -H "Authorization: Bearer $key" \
  -F image=@curl-stars.png -F prompt='change the background to pink' | take > curl-pink.png

curl -fsS "$url/v1/images/reconstructions" -H "Authorization: Bearer $key" -F image=@curl-pink.png | take > curl-again.png

picture=$(base64 < curl-pink.png | tr -d '\n')
curl -fsS "$url/v1/chat/completions" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' -d @- <<JSON |
{"messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:image/png;base64,$picture"}},
  {"type": "text", "text": "What color is the background?"}]}]}
JSON
  python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'
