#!/usr/bin/env bash
# What the collectives of a plan take on W ranks, against the planner's prediction.
source "$(dirname "$0")/common.sh"
isomoe bench comm --ranks "$W" --model-path "$MODEL" "${MORE[@]}"
