"""MEDS shards into records: against plain Python, and what is said of shards that are not as MEDS has them."""

import io
from contextlib import suppress
from datetime import datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmimpute.data import storage
from mmimpute.data.shards import Shard, fetch_table, publish_table
from mmimpute.errors import DataError, UserError
from mmimpute.spec import validated
from mmimpute.standards.features import FeatureSpec, read_features, resolve
from mmimpute.standards.meds import read_events
from mmimpute.standards.records import Source, count, publish_records
from mmimpute.standards.vocabulary import Vocabulary, add, settle
from mmimpute.standards.windows import groups
from tests.fuzz.mutations import damaged_bytes
from tests.standards.datasets import CODES, START, events, to_table, write_dataset

VALUES = ["presence", "count", "last", "mean", "min", "max", "since"]


def spec(**changes) -> FeatureSpec:
    modalities = {
        "labs": {"codes": ["LOINC//"], "values": VALUES, "days": 200},
        "dx": {"codes": ["ICD10CM//"], "values": VALUES},
        "demo": {"codes": ["GENDER//"], "values": ["presence"]},
    }
    return FeatureSpec.model_validate({"days": 100, "min_subjects": 10, "modalities": modalities} | changes)


def shard_of(url: str, key: str = "0.parquet") -> Shard:
    return next(Shard(*o) for o in storage.list_objects(f"{url}/data") if o.key == key)


def expected(rows: list[tuple], days: float) -> dict | None:
    """Values of one code, from its events in the window, (age, number), oldest first; None where there is none."""
    held = [(age, number) for age, number in rows if age is None or 0 <= age <= days]
    numbers = [n for _, n in held if n is not None]
    ages = [age for age, _ in held]
    found = {"presence": 1, "count": len(held), "since": ages[-1] if ages else None}
    if numbers:
        found |= {"last": numbers[-1], "mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}
    return found if held else None


@st.composite
def shards(draw) -> list[tuple]:
    rows = []
    for subject in range(draw(st.integers(1, 4))):
        days = sorted(draw(st.lists(st.sampled_from([0, 50, 100, 101, 200, 201, 300]), max_size=8)))  # the edges of windows
        times = [None] * draw(st.integers(0, 2)) + [START + timedelta(days=d) for d in days]
        numbers = st.one_of(st.none(), st.floats(-1e6, 1e6, width=32))
        rows += [(subject * 7 - 3, time, draw(st.sampled_from(CODES)), draw(numbers)) for time in times]
    return rows or [(1, None, CODES[0], None)]


@settings(max_examples=60, deadline=None)
@given(shards())
def test_values_are_those_of_plain_python(tmp_path_factory, rows):
    place = str(tmp_path_factory.mktemp("meds"))
    publish_table(f"{place}/data", "0.parquet", to_table(rows))
    source, wanted = Source.of(place, spec()), {}
    codes = {"labs": CODES[:2], "dx": CODES[2:4], "demo": CODES[4:5]}
    for name, names in codes.items():
        wanted[name] = tuple(sorted((code, value) for code in names for value in source.spec.modalities[name].values))
    status, _ = publish_records(source, Vocabulary(spec="", subjects=0, modalities=wanted), shard_of(place), f"{place}/out")
    last = {s: max(t for other, t, *_ in rows if other == s and t) for s in {r[0] for r in rows if r[1]}}
    assert status["rows"] == len(last) and status["undated"] == len({r[0] for r in rows} - set(last))
    if not last:
        assert status["outputs"] == []
        return
    (key,) = status["outputs"]
    made = fetch_table(f"{place}/out", key).to_pylist()
    assert {r["subject_id"]: r["index_time"] for r in made} == last
    for record in made:
        subject, index = record["subject_id"], record["index_time"]
        mine = [((index - t) / timedelta(days=1) if t else None, code, n) for other, t, code, n in rows if other == subject]
        for name, names in codes.items():
            of = {code: expected([(age, n) for age, c, n in mine if c == code], source.spec.window(name)) for code in names}
            if not any(of.values()):
                assert record[name] is None
                continue
            zero = {"presence": 0, "count": 0}
            values = [(of[code] or zero).get(value) for code, value in wanted[name]]
            found = record[name] or [None] * len(values)  # nothing but nulls is null
            assert [v is None for v in found] == [v is None for v in values]
            np.testing.assert_allclose(*(np.array(v, float) for v in (found, values)), rtol=1e-5)


def test_events_of_a_group_stay_in_the_order_of_time():
    row, column = np.sort(np.random.default_rng(0).integers(0, 3, 2000)), np.random.default_rng(1).integers(0, 2, 2000)
    found = groups(row, column, 2)
    assert found.order.tolist() == np.lexsort((np.arange(2000), column, row)).tolist() and found.size.sum() == 2000


def test_only_training_subjects_choose_the_vocabulary(tmp_path):
    place, rows = str(tmp_path), []
    for subject in range(40):  # a code of everyone, one of training subjects, one of those held out
        rows.append((subject, START, "A", 1.0))
        rows.append((subject, START + timedelta(days=1), "B" if subject < 25 else "C", None))
    publish_table(f"{place}/data", "0.parquet", to_table(rows))
    splits = {s: "train" if s < 25 else "held_out" for s in range(39)}
    publish_table(f"{place}/metadata", "subject_splits.parquet", pa.table({"subject_id": list(splits), "split": list(splits.values())}))
    source = Source.of(place, spec(modalities={"m": {"codes": [""], "values": ["presence", "last"]}}))
    counts, subjects = count(source, shard_of(place))
    assert subjects == 25
    assert counts == {"m": {"A": {"presence": 25, "last": 25}, "B": {"presence": 25}}}
    vocabulary = settle(source.spec, "", counts, subjects)
    assert vocabulary.modalities == {"m": (("A", "last"), ("A", "presence"), ("B", "presence"))}
    status, ids = publish_records(source, vocabulary, shard_of(place), f"{place}/out")
    assert ids.tolist() == list(range(40)) and [key.split("/")[0] for key in status["outputs"]] == ["held_out", "train", "unassigned"]
    parts = {key.split("/")[0]: fetch_table(f"{place}/out", key) for key in status["outputs"]}
    assert {name: len(t) for name, t in parts.items()} == {"held_out": 14, "train": 25, "unassigned": 1}
    assert all(set(t["split"].to_pylist()) == {name} for name, t in parts.items())
    assert parts["held_out"]["m"].to_pylist() == [[1, 1, 0]] * 14


def test_counts_of_shards_add_up():
    total = {}
    for _ in range(2):
        add(total, {"m": {"A": {"presence": 6}, "B": {"last": 4}}})
    assert settle(spec(modalities={"m": {"codes": ["A"], "values": ["presence"], "min_subjects": 12}}), "", total, 20).modalities == {
        "m": (("A", "presence"),)
    }
    with pytest.raises(UserError, match=r"modalities.m: none of its 2 codes has values of 13 of 20 training subjects"):
        settle(spec(modalities={"m": {"codes": ["A"], "values": ["presence"], "min_subjects": 13}}), "", total, 20)


def test_index_times_and_outcomes_of_a_cohort_file(tmp_path):
    write_dataset(str(tmp_path), {"0.parquet": range(30)})
    (tmp_path / "labels.csv").write_text(
        "subject_id,prediction_time,boolean_value\n7,2020-06-01T00:00:00,1\n3,2020-03-01T12:00:00,0\n99,2020-01-01,1\n"
    )
    (tmp_path / "features.toml").write_text(
        'cohort = "labels.csv"\ndays = 100\n[modalities.labs]\ncodes = ["LOINC//"]\nvalues = ["count"]\n'
        '[modalities.rx]\ncodes = ["RxNorm//"]\nvalues = ["presence"]\n'
    )
    source = Source.of(str(tmp_path), read_features(tmp_path / "features.toml"))
    wanted = Vocabulary(spec="", subjects=0, modalities={"labs": ((CODES[0], "count"),), "rx": ((CODES[5], "presence"),)})
    status, _ = publish_records(source, wanted, shard_of(str(tmp_path)), f"{tmp_path}/out")
    assert (status["rows"], status["undated"]) == (2, 28)
    made = fetch_table(f"{tmp_path}/out", status["outputs"][0])
    rows = events(range(30))
    for record, subject, index, outcome in zip(
        made.to_pylist(), (3, 7), (datetime(2020, 3, 1, 12), datetime(2020, 6, 1)), (0, 1), strict=True
    ):
        assert (record["subject_id"], record["index_time"], record["outcome__boolean_value"]) == (subject, index, outcome)
        held = [c for s, t, c, _ in rows if s == subject and t and timedelta() <= index - t <= timedelta(days=100)]
        labs = [c for c in held if c.startswith("LOINC//")]
        assert record["labs"] == ([labs.count(CODES[0])] if labs else None)
        assert record["rx"] == ([1] if CODES[5] in held else None)


def test_codes_belong_to_the_longest_prefix_and_a_mapping_goes_first(tmp_path):
    (tmp_path / "map.csv").write_text("code,modality,feature\nLOINC//718-7,dx,blood\nX//1,labs,\n")
    (tmp_path / "f.toml").write_text(
        'mapping = "map.csv"\n[modalities.labs]\nvalues = ["last"]\ncodes = ["LOINC//"]\n'
        '[modalities.dx]\nvalues = ["presence"]\ncodes = ["LOINC//21"]\n'
    )
    source = Source.of(str(tmp_path), read_features(tmp_path / "f.toml"))
    codes = ["LOINC//718-7", "LOINC//2160-0", "LOINC//33-1", "X//1", "Y//1"]
    modality, feature = resolve(source.spec, source.mapping, pa.array(codes))
    assert modality.tolist() == [1, 1, 0, 0, -1]
    assert feature.tolist() == ["blood", *codes[1:]]


GOOD = to_table(events(range(5)))
BAD = {
    "no code": (GOOD.drop_columns("code"), "'code': found no such column"),
    "text for a time": (GOOD.set_column(1, "time", GOOD["time"].cast(pa.string())), "'time': found type string; expected timestamps"),
    "a null code": (pa.table({"subject_id": [1], "time": [START], "code": pa.nulls(1, pa.string())}), "'code': found 1 null values"),
    "unsorted": (GOOD.take(pa.array(np.arange(len(GOOD))[::-1])), "'time': found"),
    "a subject twice": (pa.concat_tables([GOOD, GOOD]), "'subject_id': found 5 subjects in several places"),
    "infinite": (to_table([(1, START, "A", float("inf"))]), "'numeric_value': found 1 infinite values"),
    "beyond float32": (GOOD.set_column(3, "numeric_value", pa.array([1e300] * len(GOOD))), "'numeric_value': found"),
    "no events": (GOOD.slice(0, 0), "found no events"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_named_with_its_column(tmp_path, name):
    table, message = BAD[name]
    publish_table(f"{tmp_path}/data", "0.parquet", table)
    with pytest.raises(DataError, match=r"shard 0\.parquet") as error:
        read_events(f"{tmp_path}/data", shard_of(str(tmp_path)))
    assert message in str(error.value)


def test_numeric_value_may_be_absent_and_codes_a_dictionary(tmp_path):
    table = GOOD.drop_columns(["numeric_value", "text_value"]).set_column(2, "code", GOOD["code"].dictionary_encode())
    publish_table(f"{tmp_path}/data", "0.parquet", table)
    found = read_events(f"{tmp_path}/data", shard_of(str(tmp_path)))
    assert np.isnan(found.value).all() and found.codes.take(pa.array(found.code)).to_pylist() == GOOD["code"].to_pylist()


WRONG = {
    "unknown key": ({"dayz": 3}, "unknown key 'dayz'; valid keys here: cohort, mapping, days, min_subjects, modalities"),
    "unknown key inside": (
        {"modalities": {"a": {"codes": ["A"], "values": ["last"], "code": 1}}},
        "unknown key 'modalities.a.code'; valid keys here: codes, values, days, min_subjects",
    ),
    "a prefix twice": ({"modalities": {n: {"codes": ["A"], "values": ["last"]} for n in "ab"}}, "codes 'A' is given twice"),
    "a group too small": ({"min_subjects": 9}, "greater than or equal to 10"),
    "no codes": ({"modalities": {"a": {"values": ["last"]}}}, "modalities.a has no codes"),
    "a name of ours": ({"modalities": {"split": {"codes": ["A"], "values": ["last"]}}}, "that is a column of every record"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec_is_told_in_one_message(name):
    changes, message = WRONG[name]
    with pytest.raises(UserError) as error:
        validated(FeatureSpec, {"modalities": {"a": {"codes": ["A"], "values": ["last"]}}} | changes, "features.toml")
    assert message in str(error.value)


FILES = {
    "no such file": (None, "no such file"),
    "no index time": ("subject_id,when\n1,2020-01-01\n", "needs a column subject_id and one of index_time, prediction_time, time"),
    "two index times": ("subject_id,time\n1,2020-01-01\n1,2020-01-02\n", "1 subjects have more than one index time"),
    "no time": ("subject_id,time\n1,5\n", "time is int64; expected whole numbers and times"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_cohort_file_is_told_in_one_message(tmp_path, name):
    content, message = FILES[name]
    if content:
        (tmp_path / "c.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        Source.of(str(tmp_path), spec(cohort=str(tmp_path / "c.csv")))


TEXT = 'cohort = "c.csv"\ndays = 3.5\nmin_subjects = 10\n[modalities.a]\ncodes = ["A//"]\nvalues = ["last", "count"]\nmin_subjects = 12\n'
LABELS = "subject_id,prediction_time,boolean_value\n1,2020-01-01T00:00:00,1\n2,2020-01-02,0\n"


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("damaged")
    shard = io.BytesIO()
    pq.write_table(to_table(events(range(3))), shard)
    storage.write(f"{place}/data", "0.parquet", data.draw(damaged_bytes(shard.getvalue())))
    (place / "c.csv").write_bytes(data.draw(damaged_bytes(LABELS.encode())))
    (place / "f.toml").write_bytes(data.draw(damaged_bytes(TEXT.encode())))
    for call in (
        lambda: read_events(f"{place}/data", shard_of(str(place))),
        lambda: read_features(place / "f.toml"),
        lambda: Source.of(str(place), spec(cohort=f"{place}/c.csv")),
    ):
        with suppress(DataError, UserError):
            call()
