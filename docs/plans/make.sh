#!/bin/sh
# Plans of the table in docs/plan.md, one JSON file each; `d2g plan table docs/plans/*.json` prints them.
#
#     sh docs/plans/make.sh formula      rows by formula: half an hour on one core
#     sh docs/plans/make.sh compile      rows compiled for TPUs: on one core half an hour and 14 GB for SD 1.5, an hour and 30 GB for SDXL
#
# A file that is there is not made again; what a stopped run has compiled is not compiled again.
set -eu
cd "$(dirname "$0")/../.."

plan() { # name, config, topology, flags
    name=$1 config=$2 topology=$3
    shift 3
    [ -e "docs/plans/$name.json" ] ||
        python -m d2g_jax plan --config="configs/$config.py" --topology="$topology" --no-search \
            --out="docs/plans/$name.json" "$@"
}

one_device="--config.mesh.data=1 --config.mesh.fsdp=1"
bf16="--config.optimizer.generator.moment_dtype=bfloat16 --config.optimizer.discriminator.moment_dtype=bfloat16"
micro() { # rematerialisation, micro-batch of G and D, of R1
    printf -- '--config.train.remat=%s --config.train.micro_batch=%s --config.train.r1_micro_batch=%s' "$1" "$2" "$3"
}

case ${1:-formula} in
formula)
    plan sd15_gpu_8xH100 sd15 gpu:8xH100 $(micro none 16 2)
    plan sd15_gpu_1xH100 sd15 gpu:1xH100 $(micro none 8 2) $one_device
    plan sd15_gpu_1xA100-80G sd15 gpu:1xA100-80G $(micro none 8 2) $one_device
    plan sd15_gpu_1xRTX4090 sd15 gpu:1xRTX4090 $(micro full 1 1) $one_device $bf16
    plan sd15_v5e_4x4_formula sd15 v5e:4x4 --method=formula $(micro none 2 1) --config.mesh.fsdp=16
    plan sd15_v6e_4x4 sd15 v6e:4x4 --method=formula $(micro none 8 2) --config.mesh.fsdp=16
    plan sd15_v5p_2x2x1 sd15 v5p:2x2x1 --method=formula $(micro none 16 2) --config.mesh.fsdp=4
    plan sd15_v5p_2x2x2_formula sd15 v5p:2x2x2 --method=formula $(micro none 16 2)
    plan sd15_v5p_2x2x4 sd15 v5p:2x2x4 --method=formula $(micro none 16 2) --config.mesh.fsdp=16
    plan sdxl_gpu_8xH100 sdxl gpu:8xH100 $(micro none 2 1)
    plan sdxl_gpu_1xH100 sdxl gpu:1xH100 $(micro full 1 1) $one_device $bf16
    plan sdxl_gpu_1xRTX4090 sdxl gpu:1xRTX4090 $(micro full 1 1) $one_device $bf16
    plan sdxl_v6e_4x4 sdxl v6e:4x4 --method=formula $(micro full 4 1) --config.mesh.fsdp=16
    plan sdxl_v5p_2x2x1 sdxl v5p:2x2x1 --method=formula $(micro none 2 1) --config.mesh.fsdp=4
    plan sdxl_v5p_2x2x2_formula sdxl v5p:2x2x2 --method=formula $(micro none 4 1)
    plan sdxl_v5p_2x2x4 sdxl v5p:2x2x4 --method=formula $(micro none 4 1) --config.mesh.fsdp=16
    ;;
compile)
    plan sd15_v5e_4x4 sd15 v5e:4x4 $(micro none 2 1) --config.mesh.fsdp=16
    plan sd15_v5p_2x2x2 sd15 v5p:2x2x2 $(micro none 16 2)
    plan sdxl_v5p_2x2x2 sdxl v5p:2x2x2 $(micro none 4 1)
    ;;
esac
