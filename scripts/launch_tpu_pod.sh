#!/usr/bin/env bash
# Trains on a TPU slice of several hosts, one process each: scripts/launch_tpu_pod.sh NAME ZONE [arguments of jaxrl-llm
# train]. The package must be installed on every host, and the folder of --run be one that all of them share (a mounted
# bucket or disk). MESH chooses the mesh, fsdp=-1 (all chips) if unset.
set -euo pipefail
name=${1:?name of the TPU slice} zone=${2:?its zone}
shift 2
command=$(printf '%q ' jaxrl-llm train --distributed --mesh "${MESH:-fsdp=-1}" "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "${command% }"
