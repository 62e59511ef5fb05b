#!/bin/sh
# The curve of docs/when.md: MSE and E-LatentLPIPS students in one setting after another, three seeds each.
#   sh docs/when/make.sh runs/when         all settings; what is finished is left alone
#   python docs/when/draw.py runs/when     the table, and docs/when.svg
set -eu
root=${1:?give a folder, such as runs/when}
prompts() {  # prompts.txt of some grounds
    python -c "import sys; from d2g_jax.digits import captions
print(*(p.prompt for p in captions.evaluation_prompts(4096, 2, sys.argv[1:])), sep='\n')" "$@"
}
setting() {  # name, then flags
    name=$1
    shift
    d2g ablate perceptual --workdir="$root/$name" --config.pairs.solver=ddim --config.pairs.steps=25 "$@"
}
grounds() {  # name, then grounds
    name=$1
    shift
    mkdir -p "$root/prompts"
    prompts "$@" > "$root/prompts/$name.txt"
    list=$(printf "'%s'," "$@")
    setting "$name" --config.pairs.prompts="$root/prompts/$name.txt" --config.evaluation.grounds="($list)"
}
setting base
setting guidance1 --config.pairs.guidance_scale=1.0
setting guidance5 --config.pairs.guidance_scale=5.0
grounds plain plain
grounds stripes stripes
setting pairs256 --config.pairs.count=256 --config.pairs.records_per_shard=256
setting images16k --config.train.images=16384 --pairs="$root/base/pairs/1.0.0"
setting images1k --config.train.images=1024 --pairs="$root/base/pairs/1.0.0"
setting steps4 --config.pairs.steps=4
python "$(dirname "$0")/shuffled.py" ablate perceptual --workdir="$root/shuffled" \
    --config.pairs.solver=ddim --config.pairs.steps=25 --pairs="$root/base/pairs/1.0.0"
