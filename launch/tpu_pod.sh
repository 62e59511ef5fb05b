#!/bin/bash
# A TPU slice through queued resources, the same command on all its workers. SD 1.5 on v5e-16, SDXL on v5p-16:
#
#   export NAME=d2g ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite BUCKET=my-bucket
#   launch/tpu_pod.sh bucket            once: a bucket whose folders can be renamed in one piece, as checkpoints are
#   launch/tpu_pod.sh create            asks for the slice and returns; `launch/tpu_pod.sh state` until it is ACTIVE
#   launch/tpu_pod.sh install           this repository and jax[tpu] on all workers, the bucket mounted at ~/bucket
#   launch/tpu_pod.sh run train --config=configs/sd15.py --workdir='$HOME/bucket/runs/sd15' --config.mesh.fsdp=16 \
#       --config.train.remat=none --config.train.micro_batch=2 --config.train.r1_micro_batch=1
#   launch/tpu_pod.sh delete
#
#   export NAME=d2g ZONE=us-east5-a TYPE=v5p-16 RUNTIME=v2-alpha-tpuv5 BUCKET=my-bucket
#   launch/tpu_pod.sh run train --config=configs/sdxl.py --workdir='$HOME/bucket/runs/sdxl' --config.mesh.fsdp=8
#
# `d2g plan --topology=v5e:4x4` says before whether it fits, and with which settings. SPOT=1 asks for spot capacity: at
# a pre-emption all workers save and leave with 143, and the same `run` on a new slice goes on. Not run here: no TPU.
set -eu
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}" "${BUCKET:?}"
usage="usage: launch/tpu_pod.sh bucket|create|state|install|run JOB ...|delete"

everywhere() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case ${1:?$usage} in
bucket)
    # In a flat bucket gcsfuse cannot rename a folder, or does it file by file: a checkpoint could be half there.
    gcloud storage buckets create "gs://$BUCKET" --location="${ZONE%-*}" \
        --uniform-bucket-level-access --enable-hierarchical-namespace
    ;;
create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot}
    ;;
state)
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)'
    ;;
install)
    archive=$(mktemp --suffix=.tar.gz)
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:d2g_jax.tar.gz" --zone="$ZONE" --worker=all
    rm "$archive"
    everywhere "mkdir -p d2g_jax bucket && tar -xzf d2g_jax.tar.gz -C d2g_jax &&
        python3 -m venv venv && venv/bin/pip install -q ./d2g_jax 'jax[tpu]' &&
        (mountpoint -q bucket || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 $BUCKET bucket)"
    ;;
run)
    shift
    # On a slice made by queued resources the workers know each other from the metadata server alone.
    everywhere "cd d2g_jax && D2G_CLUSTER=gcetpu exec ../venv/bin/d2g $*"
    ;;
delete)
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
