#!/bin/sh
# Which digit does a picture show?  classify.sh SOCKET PICTURE.pgm   (needs curl and jq)
set -eu
socket=$1 picture=$2

# The head of a binary PGM is three lines: "P5", width and height, the value of white. Behind it is a byte per pixel.
{ read -r _; read -r width height; read -r white; } < "$picture"
pixels=$(tail -c $((width * height)) "$picture" | od -An -v -tu1 | tr -s ' \n' '\n' |
  awk -v white="$white" 'NF { printf "%s%g", s, $1 / white; s = "," }')

answer=$(curl --silent --unix-socket "$socket" http://localhost/v2/models/digits/infer --data \
  "{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1,1,$height,$width],\"data\":[$pixels]}]}")
printf %s "$answer" | jq --raw-output --arg name "$(basename "$picture")" 'if .error then error(.error) else
  .outputs[0].data | "\($name) shows a \(index(max)) (\(max * 100 | round)%)" end'
