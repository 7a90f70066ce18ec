#!/bin/bash
# IMAGE=me/lora-null:cu130 BUCKET=me/runs bash recipes/clusters/hf-jobs.sh math --output-dir /shared/runs/math
#
# Fill in: the image (recipes/docker/Dockerfile with --build-arg BUILD=cu130, pushed to where HF Jobs can pull), the bucket that keeps
# the run, and HF_TOKEN in the environment. NNODES=2 starts two jobs that find each other. A job that fails is tried again,
# and after its time is over the same line goes on. JOBS_OPTIONS=--dry-run submits nothing. Not yet run on HF Jobs.
set -euo pipefail

nodes=${NNODES:-1}
group=lora-null-$(date +%s)
for ((rank = 0; rank < nodes; rank++)); do
    network=()
    if ((nodes > 1)); then
        network=(--network-group "$group" --network-alias "node$rank")
    fi
    # shellcheck disable=SC2086,SC2016  # options are words; the prefix is known inside the job alone
    hf jobs run ${JOBS_OPTIONS:-} --detach --flavor "${FLAVOR:-h200x8}" --timeout "${TIMEOUT:-24h}" \
        --attempts "${ATTEMPTS:-5}" --volume "hf://buckets/$BUCKET:/shared" --secrets HF_TOKEN \
        --env HF_HOME=/shared/huggingface --env LORA_NULL_CACHE=/shared/lora_null_cache \
        --env NNODES="$nodes" --env NODE_RANK="$rank" ${network[@]+"${network[@]}"} \
        "$IMAGE" bash -c 'MASTER_ADDR=${HF_NETWORK_GROUP_PREFIX:-}node0 exec python -m lora_null.recipes.launch "$@"' launch "$@"
done
