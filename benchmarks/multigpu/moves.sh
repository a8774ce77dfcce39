#!/usr/bin/env bash
# What the collectives of a plan and its fused sums take on W ranks, against the prediction.
source "$(dirname "$0")/common.sh"
isomoe bench comm --ranks "$W" --model-path "$MODEL" "${MORE[@]}"
