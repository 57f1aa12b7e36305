#!/bin/bash
# `jaxcls train` under Open MPI 4 or 5, one process for each slot, which has a GPU if there are any:
#
#     train_mpi.sh HOSTFILE PHOTOS RUN [OPTION OF jaxcls train ...]
#
# HOSTFILE has a line for each machine, such as "node1 slots=8". All need jaxcls, PHOTOS and RUN under the same
# paths. Run it again to go on after a failure.
set -eu
hosts=$1 photos=$2 run=$3
shift 3

read -r first _ <"$hosts"
export JAX_COORDINATOR_ADDRESS="$first:${JAX_COORDINATOR_PORT:-55527}"

# What JAX reads is said in its own words: it knows those of Open MPI 4 alone.
# shellcheck disable=SC2016 # they are known to each process, not here
exec mpirun --hostfile "$hosts" --bind-to none -x JAX_COORDINATOR_ADDRESS bash -c '
    export JAX_NUM_PROCESSES=$OMPI_COMM_WORLD_SIZE JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK
    export JAX_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK
    exec "$@"
' _ jaxcls train "$photos" --out "$run" --resume --distributed "$@"
