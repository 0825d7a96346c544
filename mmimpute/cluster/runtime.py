"""A Ray cluster for the time of a job: the one at an address, or a local one that ends with it."""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

from mmimpute.spec import ClusterSettings

# Before ray is imported anywhere: no usage reports, and a small machine's share of footer readers.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_DATA_PARQUET_READER_CPU_COUNT": "1",
    "RAY_DATA_PARQUET_READER_IO_THREAD_COUNT": "4",
    # A worker's report waits for the next poll of its controller: 2 s by default, 59 of a small fit's 84 s.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # its C++ core warns on the console about its own libraries
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)

import ray
from ray.data import DataContext

_SHARED: ContextVar[ExitStack | None] = ContextVar("shared", default=None)  # what ends with `shared`


@contextmanager
def cluster(settings: ClusterSettings) -> Iterator[None]:
    """Connects to Ray, or starts it; a cluster that this process is connected to already is used as it is."""
    with ExitStack() as own:
        end = _SHARED.get() or own
        try:
            if not ray.is_initialized():
                end.callback(ray.shutdown)  # first: what fails in `_connect` may leave Ray connected
                _connect(settings)
            yield
        except BaseException:
            end.close()  # it may be Ray that failed: another try starts anew
            raise


@contextmanager
def shared() -> Iterator[None]:
    """Jobs within it share a cluster: it ends with this, or with a job that fails, instead of with each. To stop and start Ray between
    two stages of a flow took 6 s.
    """
    with ExitStack() as end:
        before = _SHARED.set(end)
        try:
            yield
        finally:
            _SHARED.reset(before)


def _connect(settings: ClusterSettings) -> None:
    local = {}
    if settings.address is None:
        # A bare init would attach to any cluster on this host.
        local = {"num_cpus": settings.cpus, "include_dashboard": False}
        # An actor that watches for nodes about to be taken away: here there is one, with this process on it.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(address=settings.address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    _quieten()


def _quieten() -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))
