#!/bin/bash
# Several processes on one machine, as one job. One process drives all devices of a machine just as well: this is for
# trying out what a pod will do, and for hosts with one process per device.
#
#   launch/local.sh 2 d2g train --workdir=runs/digits --config.mesh.cpu_devices=4 --config.train.groups=8
#
# and on a host of 8 GPUs, two processes of four:
#
#   DEVICES=4 launch/local.sh 2 d2g train --config=configs/sd15.py --workdir=runs/sd15
#   DEVICES=4 launch/local.sh 2 d2g train --config=configs/sdxl.py --workdir=runs/sdxl
#
# DEVICES: accelerators of each process; unset, every process sees all (CPUs are split by --config.mesh.cpu_devices).
# PORT: of process 0. Ctrl-C and SIGTERM reach all processes as SIGTERM: they save after the same step and leave with
# 143. The exit code is that of the first process which failed, in their order.
set -u
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: launch/local.sh PROCESSES d2g JOB [--flag=value ...]" >&2
    exit 2
fi
count=$1
shift
processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < count; i++)); do
    if [[ -n ${DEVICES:-} ]]; then
        export JAX_LOCAL_DEVICE_IDS=$(seq -s, $((i * DEVICES)) $(((i + 1) * DEVICES - 1)))
    fi
    JAX_COORDINATOR_ADDRESS=localhost:${PORT:-12355} JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$i "$@" &
    processes+=($!)
done
failed=0
for process in "${processes[@]}"; do
    wait "$process"
    code=$?
    while kill -0 "$process" 2>/dev/null; do # a signal ended the wait, not the process
        wait "$process"
        code=$?
    done
    if [[ $failed -eq 0 ]]; then failed=$code; fi
done
exit "$failed"
