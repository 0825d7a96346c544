"""A small MEDS dataset, and its events as plain rows."""

from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa

from mmimpute.data.shards import publish_table
from mmimpute.standards.meds import EVENTS, publish_events

CODES = ["LOINC//2160-0", "LOINC//718-7", "ICD10CM//E11.9", "ICD10CM//I10", "GENDER//F", "RxNorm//860975"]
START = datetime(2020, 1, 1)


def events(subjects: range, seed: int = 0) -> list[tuple]:
    """(subject, time, code, number) of people with up to thirty events in a year, sorted as MEDS has them."""
    rng, rows = np.random.default_rng(seed), []
    for subject in subjects:
        rows += [(subject, None, "GENDER//F", None)] * int(rng.integers(2))
        for day in np.sort(rng.integers(0, 365, rng.integers(1, 31))):
            code = CODES[rng.choice([0, 1, 2, 3, 5])]
            number = round(float(rng.normal(10)), 3) if code.startswith("LOINC") and rng.random() < 0.8 else None
            rows.append((subject, START + timedelta(days=int(day)), code, number))
    return rows


def to_table(rows: list[tuple]) -> pa.Table:
    columns = [list(c) for c in zip(*rows, strict=True)]
    return pa.table([*columns, [None] * len(rows)], schema=EVENTS)


def write_dataset(url: str, shards: dict[str, range], splits: dict[int, str] | None = None, seed: int = 0) -> None:
    """splits: of each subject."""
    for number, (key, subjects) in enumerate(shards.items()):
        publish_events(url, key, to_table(events(subjects, seed + number)))
    if splits:
        publish_table(f"{url}/metadata", "subject_splits.parquet", pa.table({"subject_id": list(splits), "split": list(splits.values())}))
