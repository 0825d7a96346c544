"""CSV files: one type a column, ids as they are written, errors that quote nothing."""

import gzip

import pytest

from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, list_shards
from mmimpute.drafting import guess_spec
from mmimpute.errors import UserError
from mmimpute.standards.csv import to_shards


def write(place: str, **files: str | bytes) -> None:
    for name, text in files.items():
        content = text.encode() if isinstance(text, str) else text
        storage.write(place, name.replace("_csv", ".csv").replace("_gz", ".gz"), content)


def test_types_are_settled_on_all_files(place, tmp_path):
    first = "patient_id,age,sodium,ward,empty,seen\n007,61,,a,,2020-01-02\n008,NA,140,b,,2020-01-03\n"
    write(place, a_csv=first, b_csv_gz=gzip.compress(b"patient_id,age,sodium,ward,empty,seen\n9,61.5,141,3,,\n"))
    out = str(tmp_path / "out")
    assert to_shards(place, out) == {"rows": 3, "shards": 2, "set_aside": {}}
    a, b = (fetch_table(out, s.key) for s in list_shards(out))
    assert a.schema.equals(b.schema)
    assert [str(t) for t in a.schema.types] == ["string", "double", "int64", "string", "double", "date32[day]"]
    assert a.to_pylist()[0] == {"patient_id": "007", "age": 61.0, "sodium": None, "ward": "a", "empty": None, "seen": a["seen"][0].as_py()}
    assert guess_spec(a.schema).modalities["columns"].features == ("age", "sodium", "ward", "empty")


def test_a_broken_file_is_set_aside_and_not_quoted(tmp_path):
    place, out = str(tmp_path / "in"), str(tmp_path / "out")
    write(
        place,
        good_csv="id,x\n1,2\n",
        long_csv="id,x\n1,2\nplanted-4711,3,4\n",
        twice_csv="id,x,x\n1,2,3\n",
        noise_csv=b"id,x\n1,\xff\xfe\n",
    )
    done = to_shards(place, out)
    assert (done["rows"], done["shards"]) == (1, 1) and [s.key for s in list_shards(out)] == ["good.parquet"]
    assert "a line of 3 columns under a header of 2" in done["set_aside"]["long.csv"]
    assert done["set_aside"].keys() == {"long.csv", "twice.csv", "noise.csv"} and "planted" not in str(done)


def test_what_cannot_be_named_apart(tmp_path):
    place = str(tmp_path)
    with pytest.raises(UserError, match="no file"):
        to_shards(place, place)
    write(place, a_csv="id,x\n1,2\n", a_csv_gz=gzip.compress(b"id,x\n1,2\n"))
    with pytest.raises(UserError, match="two files have the same name"):
        to_shards(place, place)
