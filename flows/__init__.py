"""Prefect flows: a handful of tasks, each one library call.

They run on an ephemeral Prefect with nothing else started, and against a server where PREFECT_API_URL is set.
"""

import os

for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(_name, _value)  # before prefect is imported
