#!/usr/bin/env bash
# One checkpoint on every kind of layout, then with the historical defect planted. About 3 minutes.
set -euo pipefail
export TOKENIZERS_PARALLELISM=false

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }
run() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }

say "1. The plan: two ranks, each with its own requests and half of the experts"
run isomoe plan --tp 2 --attn-dp-size 2 --ep 2 --device cpu --rows 8

say "2. Parity: the same checkpoint on every layout, then with the experts summed twice"
# Ends with 1, since the last row differs: it has to.
run isomoe parity tp2 tp2,dp2 tp2,ep2 tp2,dp2,ep2 tp4,dp2,ep4 \
  tp2,dp2,ep2+double-reduce --num-prompts 20 --bisect || [ $? -eq 1 ]

say "3. Accuracy, as a nightly would read it: one rank, the mixed layout, and the mixed layout with the defect"
run isomoe eval --task arith --limit 200
run isomoe eval --task arith --limit 200 --tp 2 --attn-dp-size 2 --ep 2
run isomoe eval --task arith --limit 200 --tp 2 --attn-dp-size 2 --ep 2 --inject double-reduce

say "4. The proof that it cannot happen here, and that the proof would see it"
run isomoe prove --all-models --max-ranks 16
run isomoe prove --max-ranks 16 --mutant double-reduce || [ $? -eq 1 ]

say "Next: .venv/bin/isomoe plan --help, with the config.json and the layout that you run"
