#!/bin/sh
# Starts a worker for the pool POOL, or the command that is given instead.
set -eu
# Where /data is a fresh mount, the folders that /app/data leads to are not there yet.
mkdir -p /data/cache /data/raw /data/runs
if [ $# -eq 0 ]; then
    : "${POOL:?name the work pool, cpu or gpu}"
    set -- prefect worker start --pool "$POOL" --type process --with-healthcheck
fi
exec "$@"
