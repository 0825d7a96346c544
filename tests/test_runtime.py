"""How long a local Ray lives."""

import pytest
import ray

from mmimpute.cluster import runtime
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings

pytestmark = pytest.mark.services


def node() -> str:
    """The cluster of a job: its only node."""
    with runtime.cluster(ClusterSettings(cpus=1)):
        return ray.nodes()[0]["NodeID"]


def test_jobs_share_a_cluster_until_one_fails():
    with runtime.shared():
        assert not ray.is_initialized()  # nothing starts before a job needs it
        first = node()
        assert node() == first
        with pytest.raises(UserError), runtime.cluster(ClusterSettings(cpus=1)):
            raise UserError("as if Ray had gone")
        assert not ray.is_initialized() and node() != first
    assert not ray.is_initialized()


def test_a_cluster_of_somebody_else_is_left_running():
    with runtime.cluster(ClusterSettings(cpus=1)):
        with runtime.shared():
            node()
        with pytest.raises(UserError), runtime.cluster(ClusterSettings(cpus=1)):
            raise UserError("no fault of Ray's")
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_what_fails_after_ray_has_started_leaves_none_behind(monkeypatch):
    def fails():
        raise OSError("as if a setting were refused")

    monkeypatch.setattr(runtime, "_quieten", fails)
    with pytest.raises(OSError, match="refused"):
        node()
    assert not ray.is_initialized()
