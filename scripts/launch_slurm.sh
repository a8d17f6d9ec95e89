#!/usr/bin/env bash
#SBATCH --job-name=jaxrl-llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
# Trains on GPU nodes, one process each: sbatch [--nodes N --gpus-per-node N] scripts/launch_slurm.sh [arguments of
# jaxrl-llm train]. The folder of --run must be one that all nodes share. MESH chooses the mesh, fsdp=-1 if unset.
set -euo pipefail
# A node that fails ends the job; its state is in the last checkpoint: jaxrl-llm resume.
exec srun --kill-on-bad-exit=1 jaxrl-llm train --distributed --mesh "${MESH:-fsdp=-1}" "$@"
