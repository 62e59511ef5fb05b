#!/bin/bash
# A SLURM job: one process per node, which drives all its GPUs. Give the job and its flags to sbatch; SD 1.5 and SDXL:
#
#   sbatch --nodes=8 launch/slurm.sh train --config=configs/sd15.py --workdir=/shared/runs/sd15
#   sbatch --nodes=8 launch/slurm.sh train --config=configs/sdxl.py --workdir=/shared/runs/sdxl
#
# The pairs before: the same with `pairs`; its nodes divide the shards. --workdir must be one folder, seen by all nodes.
# `mesh.fsdp` = 8 keeps the sharding of parameters inside a node, `mesh.data` = -1 takes the nodes.
#
# Five minutes before its time is over, or when it is pre-empted, the job saves and leaves with 143; with 75 when a node
# died. In both cases it is queued again and goes on. Not run here: no SLURM.
#SBATCH --job-name=d2g
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=d2g-%j.log
set -u
# JAX gives each of SLURM's tasks one GPU unless told which ones are its own.
JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))
export JAX_LOCAL_DEVICE_IDS
# A kill or a crash of one task does not end the others at once: they say which it was, and leave by themselves.
srun --kill-on-bad-exit=0 --wait=120 d2g "$@"
code=$?
if [[ $code -eq 143 || $code -eq 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
