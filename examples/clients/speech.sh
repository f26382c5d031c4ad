#!/bin/sh
# Where in a recording does somebody speak?  speech.sh SOCKET CLIP.wav   (needs curl and jq)
set -eu
socket=$1 clip=$2
window=512 context=64
samples=$((($(wc -c < "$clip") - 44) / 2)) # behind a WAV header of 44 bytes

state=$(awk 'BEGIN { for (i = 0; i < 256; i++) printf "%s0", i ? "," : "" }')
before=$(awk 'BEGIN { for (i = 0; i < 64; i++) printf "%s0", i ? "," : "" }')
speaking=0 windows=0
while [ $(((windows + 1) * window)) -le "$samples" ]; do
  heard=$(tail -c +$((45 + windows * window * 2)) "$clip" | head -c $((window * 2)) | od -An -v -td2 | tr -s ' \n' '\n' |
    awk 'NF { printf "%s%.9g", s, $1 / 32768; s = "," }')
  answer=$(curl --silent --show-error --fail-with-body --unix-socket "$socket" http://localhost/v2/models/vad/infer --data @- <<JSON
{"inputs":[{"name":"input","datatype":"FP32","shape":[1,$((context + window))],"data":[$before,$heard]},
           {"name":"state","datatype":"FP32","shape":[2,1,128],"data":[$state]},
           {"name":"sr","datatype":"INT64","shape":[],"data":[16000]}]}
JSON
  )
  state=$(printf %s "$answer" | jq --raw-output '.outputs[] | select(.name == "stateN").data | join(",")')
  speaking=$((speaking + $(printf %s "$answer" | jq '.outputs[] | select(.name == "output").data[0] | if . > 0.5 then 1 else 0 end')))
  before=$(printf %s "$heard" | tr , '\n' | tail -n $context | paste -sd, -)
  windows=$((windows + 1))
done
echo "$(basename "$clip"): speech in $speaking of $windows windows of 32 ms"
