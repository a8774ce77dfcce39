#!/usr/bin/env bash
# The report's table: every layout of W ranks against plain tp, then with the experts summed twice.
source "$(dirname "$0")/common.sh"
LAYOUTS=("tp$W" "tp$W,dp$W" "tp$W,ep$W" "tp$W,dp$W,ep$W")
[ "$W" -ge 4 ] && LAYOUTS+=("tp$W,dp$((W / 2)),ep$W")
# Ends with 1, since the last target differs: it has to.
isomoe parity "${LAYOUTS[@]}" "tp$W,dp$W,ep$W+double-reduce" --model-path "$MODEL" --load-format dummy \
  --random-prompts "${PROMPTS:-64}" --max-tokens "${TOKENS:-64}" "${MORE[@]}" ||
  [ $? -eq 1 ]
