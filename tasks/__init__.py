"""The work itself: each stage is pure functions under one thin task.

Libraries read these variables when they are first imported, so they are set here, before that. What a run's result or
record rests on is set whatever the user's surroundings say; the rest is a default. ``docs/surroundings.md`` lists what
of a user's environment is overridden, obeyed and refused.
"""

import os
from urllib.request import getproxies

OVERRIDDEN = {
    # No telemetry is sent. Results that Prefect is asked to keep are JSON, not pickle.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # Prefect caches no task: ``tasks.runs.stages`` does, by content. Retries sit where they help.
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
    "PREFECT_TASKS_DEFAULT_RETRIES": "0",
    "PREFECT_FLOWS_DEFAULT_RETRIES": "0",
    "KERAS_NNX_ENABLED": "false",
    "MPLBACKEND": "agg",
}
DEFAULTS = {
    # The temporary server may take longer to start than Prefect's 20 s. A server that is away for some minutes is
    # waited for (pauses of 2, 4, 8 … 256 s instead of a minute in all).
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "KERAS_BACKEND": "tensorflow",  # the variable wins over ~/.keras/keras.json
}
LIMITS_OF_KERAS = ("KERAS_MAX_EPOCHS", "KERAS_MAX_STEPS_PER_EPOCH")
"""With these Keras would end a training early, without a word."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def pass_by_proxies() -> None:
    """Makes requests to this machine (Prefect's servers, a store, a scheduler) go past the proxies that are set.

    Both spellings of the variable are set, since some libraries read only one; of two different ones the lower case
    counts, as it does in Python. Proxies of the system's own settings (macOS) become variables, which Python would no
    longer look up once there is one.
    """
    proxies = getproxies()
    excepted = [name.strip() for name in proxies.pop("no", "").split(",") if name.strip()]
    if not proxies or "*" in excepted:
        return
    for scheme, address in proxies.items():
        os.environ.setdefault(f"{scheme}_proxy", address)
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*excepted, *LOOPBACK]))


os.environ.update(OVERRIDDEN)
for _name, _value in DEFAULTS.items():
    os.environ[_name] = os.environ.get(_name) or _value
for _name in LIMITS_OF_KERAS:
    os.environ.pop(_name, None)
pass_by_proxies()
