"""An object store that answers a tenth of all calls with an error, or not at all."""

from itertools import islice

import pytest

from mmimpute import jobs
from mmimpute.data import storage, table
from mmimpute.spec import ClusterSettings
from tests.faults.conftest import SETTINGS, SHARDS
from tests.faults.processes import FEW
from tests.faults.proxy import FAULTS, proxy

pytestmark = pytest.mark.services


@pytest.mark.parametrize("seed", range(FEW))
def test_a_tenth_of_the_calls_fail(seed, endpoint, nodes, cohort, bucket, check, monkeypatch):
    with proxy(endpoint.url, 0.1, seed) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        with nodes.connected(AWS_ENDPOINT_URL=between.url) as cluster:
            done = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, cluster)
        assert not done["set_aside"] and done["committed"]["added"] == SHARDS
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
    print(f"{between.requests} calls, {dict(between.injected)}")
    assert between.injected.total() > 0.05 * between.requests
    check("store: 500, 503, SlowDown or reset on 10%", between.injected.total(), f"{bucket}/out")


@pytest.mark.parametrize("version", [0, 1], ids=["creation", "commit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_commit_fails(fault, version, endpoint, reference, cohort, bucket, check, monkeypatch):
    """All is published, and the write that makes it the table goes wrong once, or does what it should and nobody hears of it."""
    for key in reference[0]:
        storage.write(f"{bucket}/out", key, storage.read("s3://faults/reference", key))
    if version:
        table.commit(f"{bucket}/out", islice(table.published(f"{bucket}/out"), SHARDS // 2), {})
    with proxy(endpoint.url, on=(rb"PUT .*/_delta_log/0*%d\.json" % version, fault)) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        done = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, ClusterSettings())
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
    assert between.injected == {fault: 1} and done["done_before"] == SHARDS
    again = jobs.impute_cohort(cohort.model, cohort.shards, f"{bucket}/out", SETTINGS, ClusterSettings())
    assert again["committed"]["added"] == again["committed"]["removed"] == 0
    check(f"{fault} on the table's {'commit' if version else 'creation'}", 1, f"{bucket}/out")
