"""Written by `mmimpute features apply`. Feast's DuckDB store, which reads Parquet on disk and in S3 by pyarrow and s3fs.

DuckDB itself reads S3 only with an extension that it downloads, and not from a server of your own. Feast's other store, Dask, leaves
out rows that have no earlier value, and fails where a partition holds unknown subjects only.
"""

from functools import partial

import ibis
from feast.infra.offline_stores import ibis as engine
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from fsspec.core import url_to_fs
from pyarrow import dataset


def read(source, repo_path: str) -> ibis.Table:
    """The Parquet files under a source's path. They are scanned when they are needed, only the columns that are."""
    files, path = url_to_fs(source.path)
    return ibis.memtable(dataset.dataset(path, filesystem=files, format="parquet"))


def write(*_) -> None:
    raise NotImplementedError("this store only reads: keep training features by to_df() or to_arrow()")


class ParquetOfflineStoreConfig(DuckDBOfflineStoreConfig):
    type: str = "parquet_store.ParquetOfflineStore"


def reading(function):
    return staticmethod(partial(function, data_source_reader=read, data_source_writer=write))


class ParquetOfflineStore(DuckDBOfflineStore):
    get_historical_features = reading(engine.get_historical_features_ibis)
    pull_all_from_table_or_query = reading(engine.pull_all_from_table_or_query_ibis)
    pull_latest_from_table_or_query = reading(engine.pull_latest_from_table_or_query_ibis)
