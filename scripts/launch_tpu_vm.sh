#!/usr/bin/env bash
# Trains on the TPU chips of one VM: scripts/launch_tpu_vm.sh NAME ZONE [arguments of jaxrl-llm train]
# The package must be installed there (`pip install 'jaxrl_llm[tpu]'`); MESH chooses the mesh, fsdp=-1 (all chips) if unset.
set -euo pipefail
name=${1:?name of the TPU VM} zone=${2:?its zone}
shift 2
command=$(printf '%q ' jaxrl-llm train --mesh "${MESH:-fsdp=-1}" "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --command "${command% }"
