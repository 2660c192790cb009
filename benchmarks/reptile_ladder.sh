#!/usr/bin/env bash
# Why the published Reptile run stalls: from its settings to ours, one change at a time, with equal numbers of images.
#
#     bash benchmarks/reptile_ladder.sh cifar100
#
# Trains on all seen classes but the last nine, which are measured on the way; keeps every change. Writes the runs into
# runs/ladder and draws docs/reptile-ladder.png.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-cifar100} images=${2:-46080} # of each run

settings=()
run() { # name, images of a meta-iteration, what changes
  settings+=("${@:3}")
  local iters=$((images / $2))
  python train_reptile.py --data "$data" --withhold 0.1 --width 16 --rotate 0 --cutout 0 --penultimate 0 \
    --iters $iters --validate-every $(((iters + 5) / 6)) --out "runs/ladder/$1" --overwrite "${settings[@]}"
}

run "published settings" $((30 * 256)) --task domain --images-per-class 128 --inner-steps 30 --optimizer adam \
  --beta1 0.9 --meta-step-size 0.01 --no-soft-margin --margin 0.3
run "meta-step 1 instead of 0.01" $((30 * 256)) --meta-step-size 1
run "12 anchor classes instead of 1" $((30 * 252)) --task classes --way 12 --images-per-class 21
run "4 inner steps instead of 30" $((4 * 252)) --inner-steps 4
run "4 images of a class instead of 21" $((4 * 48)) --images-per-class 4
run "no first moment" $((4 * 48)) --beta1 0
run "soft margin instead of the hinge" $((4 * 48)) --soft-margin
run "Muon instead of Adam" $((4 * 48)) --optimizer muon

python benchmarks/plot_runs.py runs/ladder/{pub,meta,12,"4 inner","4 images",no,soft,Muon}* \
  --metric new_triplet_accuracy --against images --out docs/reptile-ladder.png
