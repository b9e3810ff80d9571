#!/bin/sh
# Starts a worker for the pool POOL, or the given command.
set -eu
# In a fresh mount at /data, the folders that /app/data links to do not exist yet.
mkdir -p /data/cache /data/raw /data/runs
if [ $# -eq 0 ]; then
    : "${POOL:?name the work pool, cpu or gpu}"
    set -- prefect worker start --pool "$POOL" --type process --with-healthcheck
fi
exec "$@"
