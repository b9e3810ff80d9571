"""The work itself: each stage is pure functions under one thin task.

Prefect and Great Expectations read these variables when they are first imported, so they are set here, before that.
The temporary server may take longer to start than Prefect's 20 s. A server that is away for some minutes is waited for
(pauses of 2, 4, 8 … 256 s instead of a minute in all). No telemetry is sent. Results that Prefect is asked to keep are
JSON, not pickle. Prefect caches no task: ``tasks.runs.stages`` does, by content.
"""

import os

SURROUNDINGS = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
}
for _name, _value in SURROUNDINGS.items():
    os.environ.setdefault(_name, _value)
