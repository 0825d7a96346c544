"""What a run did to each shard, as a Parquet record beside the table, so that a run can be looked into afterwards."""

import json
import tempfile
import uuid
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from mmimpute.data import storage
from mmimpute.imputing import PHASES

SCHEMA = pa.schema(
    [("shard", pa.string()), ("output", pa.string()), ("rows", pa.int64()), ("from_prior", pa.int64()), ("values", pa.int64())]
    + [(f"seconds_{phase}", pa.float64()) for phase in PHASES]
    + [("tries", pa.int32()), ("error", pa.string())]
)
TOGETHER = 1_000  # statuses held in memory
IN_MEMORY = 16 << 20


class Record:
    """Statuses of shards (see `imputing.ShardImputer.impute`), one row each; of millions only some are in memory. To be closed."""

    def __init__(self) -> None:
        self.started = datetime.now(UTC)
        self.file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115 (`close`)
        self.writer = pq.ParquetWriter(self.file, SCHEMA, compression="zstd")
        self.held: list[dict] = []

    def add(self, status: dict) -> None:
        values = sum(entry["values"] for entry in status["imputed"].values())
        seconds = {f"seconds_{phase}": s for phase, s in status["seconds"].items()}
        self.held.append({name: status.get(name) for name in SCHEMA.names} | seconds | {"values": values})
        if len(self.held) == TOGETHER:
            self._flush()

    def publish(self, url: str, run: dict) -> str:
        """Writes the record, with what is true of the whole run as its metadata `mmimpute.run`. Returns its URL."""
        self._flush()
        self.writer.add_key_value_metadata({"mmimpute.run": json.dumps(run | {"started": self.started.isoformat()})})
        self.writer.close()
        self.file.seek(0)
        name = f"impute-{self.started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}.parquet"
        storage.write(url, name, self.file)
        return storage.join(url, name)

    def close(self) -> None:
        self.writer.close()
        self.file.close()

    def _flush(self) -> None:
        if self.held:
            self.writer.write_table(pa.Table.from_pylist(self.held, SCHEMA))
            self.held = []
