#!/usr/bin/env bash
# Train the CPU edition: all eight stages in order, each where it was stopped; what has ended is left alone.
#
#   scripts/pico.sh [RUNS]                 from the first stages, which lie in weights/chain
#   FRESH=1 scripts/pico.sh [RUNS]         from nothing
#
# PROCESSES (2) share a stage, with one thread each; `instruct` and the tokenizer's stages run side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs}
processes=${PROCESSES:-2}
export OMP_NUM_THREADS=1

mkdir -p "$runs"
[ -n "${FRESH:-}" ] || cp -rn weights/chain/. "$runs/"
[ -e "${UNILIP_DATA:-$HOME/.cache/unilip/emoji}/atlas-160.npz" ] || unilip data prepare emoji

alone() { [ -e "$runs/pico/$1/final" ] || unilip train "pico/$1" --runs "$runs"; }
shared() {
    [ -e "$runs/pico/$1/final" ] && return
    torchrun --standalone --nproc-per-node="$processes" -m unilip train "pico/$1" "${@:2}" --runs "$runs"
}

shared clip
alone instruct &
words=$!
[ -e "$runs/pico/recon_distill/final" ] || alone recon # its result holds all of the short one before
alone recon_distill
wait "$words"
shared pretrain --set compile=true
shared sft --set compile=true
shared shapes
shared few --set compile=true
echo "$runs/pico/few/final"
