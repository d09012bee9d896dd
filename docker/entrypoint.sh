#!/bin/bash
# What a container of these images does: a Ray head, a Ray worker, a run that joins them, or any rlhf-ray command.
#
#   docker run IMAGE head                       [options of ray start]
#   docker run IMAGE worker HEAD:6379           [options of ray start]
#   docker run -e RAY_ADDRESS=HEAD:6379 IMAGE job rl run.yaml executor=ray    waits until the head answers
#   docker run IMAGE rl run.yaml                any command of rlhf-ray
#   docker run -it IMAGE bash                   a shell; likewise ray, python
set -eu

if [ -d /dev/shm ] && [ "$(df --output=size -k /dev/shm | tail -n 1)" -lt 1000000 ]; then
    echo "entrypoint: /dev/shm is small (Docker gives 64 MB), and Ray keeps objects there: docker run --shm-size=16g" >&2
fi

# The first 5 minutes of a head may go into pulling its image.
wait_for() {
    case "$1" in
    *:*) ;;
    *) echo "entrypoint: '$1' is not HEAD:PORT" >&2 && exit 2 ;;
    esac
    for _ in $(seq "${WAIT_S:-300}"); do
        if (: <"/dev/tcp/${1%:*}/${1##*:}") 2>/dev/null; then return; fi
        sleep 1
    done
    echo "entrypoint: nothing answers at $1 after ${WAIT_S:-300} s; is the head running, and its name known here?" >&2
    exit 75
}

mode=${1:-doctor}
[ $# -gt 0 ] && shift
case "$mode" in
head) exec ray start --head --block --port=6379 --dashboard-host=0.0.0.0 "$@" ;;
worker)
    head=${1:?"worker needs the head's HOST:PORT"}
    shift
    wait_for "$head"
    exec ray start --block --address="$head" "$@"
    ;;
job)
    wait_for "${RAY_ADDRESS:?"job needs RAY_ADDRESS=HEAD:6379"}"
    exec rlhf-ray "$@"
    ;;
bash | sh | ray | python | python3) exec "$mode" "$@" ;;
*) exec rlhf-ray "$mode" "$@" ;;
esac
