"""The record of a run."""

import json
from contextlib import closing

import pyarrow.parquet as pq

from mmimpute import metrics


def status(number: int, error: str | None = None) -> dict:
    seconds = {"read": 0.1, "model": 0.2, "write": 0.3}
    imputed = {} if error else {"labs": {"rows": 3, "values": 7}, "rna": {"rows": 1, "values": 5}}
    outcome = {"rows": 10, "from_prior": 1, "imputed": imputed, "tries": 2, "error": error}
    return {"shard": f"{number}.parquet", "output": "o", "seconds": seconds} | outcome


def test_one_row_per_shard_and_the_run_in_the_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "TOGETHER", 2)
    with closing(metrics.Record()) as record:
        for number in range(5):
            record.add(status(number, "shard 4: bad" if number == 4 else None))
        file = pq.ParquetFile(record.publish(str(tmp_path), {"retries": 5}))
    written = file.read()
    assert written["shard"].to_pylist() == [f"{n}.parquet" for n in range(5)]
    assert written["values"].to_pylist() == [12, 12, 12, 12, 0] and written["error"].drop_null().to_pylist() == ["shard 4: bad"]
    assert written["seconds_model"].to_pylist() == [0.2] * 5 and written["tries"].to_pylist() == [2] * 5
    assert json.loads(file.metadata.metadata[b"mmimpute.run"])["retries"] == 5
