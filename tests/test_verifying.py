"""An enriched shard against its input: a good one passes, every kind of damage is found and named, never with a value."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmimpute import registry, verifying
from mmimpute.data import storage
from mmimpute.data.arrow import decode, enrich, enriched_schema
from mmimpute.data.shards import Shard, fetch_table, list_shards, publish_table
from mmimpute.data.table import output_key, source
from mmimpute.imputing import impute_shard
from mmimpute.spec import ImputeSettings
from mmimpute.verifying import Pair, differing, imputed_problems, input_problems, pairs_of, verify_shard
from tests.conftest import linear_cohort
from tests.data.test_arrow import cohorts, said
from tests.test_imputing import flipped


@pytest.fixture(scope="module")
def schema(small_cohort):
    return registry.describe(small_cohort[2]).cohort


@pytest.fixture(scope="module")
def good(small_cohort, tmp_path_factory):
    """(shards, pair, output) of a shard with a record of which nothing was observed, imputed with all that may be added."""
    folder = tmp_path_factory.mktemp("verify")
    shards, output = str(folder / "shards"), str(folder / "out")
    table = linear_cohort(300, seed=3)
    empty = pa.table({"subject_id": ["nobody"], **{c: pa.nulls(1, table[c].type) for c in table.column_names[1:]}})
    publish_table(shards, "part.parquet", pa.concat_tables([table, empty]).combine_chunks())
    (shard,) = list_shards(shards)
    everything = ImputeSettings(interval=0.9, draws=2, latent=True)
    status = impute_shard(registry.load(small_cohort[2]), shards, shard, output, everything)
    return shards, pair_of(shard, status["output"], output), output


def pair_of(shard: Shard, key: str, output: str) -> Pair:
    return next(Pair(*shard, *o) for o in storage.list_objects(output) if o.key == key)


@pytest.mark.parametrize("batch", [7, 8192])
def test_a_good_shard_passes(batch, schema, good, monkeypatch):
    monkeypatch.setattr(verifying, "BATCH", batch)
    shards, pair, output = good
    assert verify_shard(schema, shards, pair, output) == {"shard": "part.parquet", "rows": 301, "problems": []}


def edited(column: str, row_of, value_of):
    """Damage: the value of a column in the first row for which `row_of(row)` holds becomes `value_of(value)`."""

    def damage(table: pa.Table) -> pa.Table:
        at = next(i for i, row in enumerate(table.to_pylist()) if row_of(row))
        values = table[column].to_pylist()
        values[at] = value_of(values[at])
        return table.set_column(table.column_names.index(column), table.field(column), pa.array(values, table[column].type))

    return damage


def some_missing(row: dict) -> bool:
    return row["labs"] is not None and row["labs"][0] is not None and None in row["labs"]


def all_seen(row: dict) -> bool:
    return row["labs"] is not None and None not in row["labs"]


def no_site(row: dict) -> bool:
    return row["dx__site"] is None


def first(value):
    """The list with another first element."""
    return lambda values: [value(values[0]) if callable(value) else value, *values[1:]]


def swapped(table: pa.Table) -> pa.Table:
    return table.take(pa.array([1, 0, *range(2, len(table))]))


def with_metadata(**changes: str):
    return lambda t: t.replace_schema_metadata({**t.schema.metadata, **{k.replace("_", ".", 1).encode(): v for k, v in changes.items()}})


DAMAGE = {
    "input value": (edited("outcome__died", lambda _: True, lambda v: 1 - v), "1 rows of 'outcome__died' differ from the input"),
    "subject": (edited("subject_id", lambda _: True, lambda v: "s999999"), "1 rows of 'subject_id' differ from the input"),
    "an input value lost": (edited("labs", some_missing, first(None)), "1 rows of 'labs' differ from the input"),
    "swapped rows": (swapped, "2 rows of 'subject_id' differ from the input"),
    "observed value altered": (
        edited("labs__imputed", some_missing, first(lambda v: np.nextafter(np.float32(v), np.float32(9)).item())),
        "1 observed values are altered in 'labs__imputed'",
    ),
    "null inside": (edited("labs__imputed", some_missing, first(None)), "1 missing values are left in 'labs__imputed'"),
    "NaN inside": (edited("labs__imputed", some_missing, first(np.nan)), "1 missing values are left in 'labs__imputed'"),
    "null row": (edited("labs__imputed", lambda r: r["labs"] is None, lambda _: None), "4 missing values are left in 'labs__imputed'"),
    "null text": (edited("dx__site__imputed", no_site, lambda _: None), "1 missing values are left in 'dx__site__imputed'"),
    "null code": (edited("dx__code__imputed", no_site, lambda _: None), "1 missing values are left in 'dx__code__imputed'"),
    "deviation of an observed value": (edited("labs__std", some_missing, first(0.1)), "1 observed values have no 0 in 'labs__std'"),
    "no deviation": (edited("dx__code__std", no_site, lambda _: None), "1 imputed values have no deviation in 'dx__code__std'"),
    "negative deviation": (edited("dx__site__std", no_site, lambda _: -1.0), "1 imputed values have no deviation in 'dx__site__std'"),
    "imputed though whole": (
        edited("labs__imputed", all_seen, lambda _: [1.0] * 4),
        "1 rows that miss nothing are not null in 'labs__imputed'",
    ),
    "from_prior": (edited("from_prior", lambda _: True, lambda v: not v), "1 rows have a wrong 'from_prior'"),
    "row gone": (lambda t: t.slice(1), "300 rows; expected 301"),
    "input column gone": (lambda t: t.drop_columns(["outcome__died"]), "no column 'outcome__died'"),
    "imputed column gone": (lambda t: t.drop_columns(["rna__std"]), "no column 'rna__std'"),
    "another type": (
        lambda t: t.set_column(t.column_names.index("dx__stage"), "dx__stage", t["dx__stage"].cast(pa.float32())),
        "column 'dx__stage' is float; expected double",
    ),
    "stale ETag": (with_metadata(mmimpute_input_etag="old"), "made from another version of its input"),
    "another shard": (with_metadata(mmimpute_input="x.parquet"), "made from another shard"),
    "no lineage": (lambda t: t.replace_schema_metadata(None), "made from another shard"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(case, schema, good, tmp_path):
    shards, pair, output = good
    damage, message = DAMAGE[case]
    publish_table(str(tmp_path), pair.output, damage(fetch_table(output, pair.output)))
    problems = verify_shard(schema, shards, pair_of(Shard(*pair[:3]), pair.output, str(tmp_path)), str(tmp_path))["problems"]
    assert message in problems
    assert len(problems) == 1 or case in ("swapped rows", "an input value lost", "no lineage")
    assert "s000000" not in str(problems) and "s999999" not in str(problems)


def test_objects_that_cannot_be_read_are_named(schema, good, tmp_path):
    shards, pair, output = good
    assert "no such object" in verify_shard(schema, shards, pair._replace(output="none.parquet"), output)["problems"][0]
    storage.write(str(tmp_path), pair.output, flipped(storage.read(output, pair.output)))
    damaged = pair_of(Shard(*pair[:3]), pair.output, str(tmp_path))
    assert "no readable Parquet file" in verify_shard(schema, shards, damaged, str(tmp_path))["problems"][0]
    assert "another version of the object" in verify_shard(schema, shards, pair._replace(etag="older"), output)["problems"][0]


def test_a_type_that_cannot_be_compared_is_no_pass(schema, good, tmp_path):
    shards, pair, output = good
    views = pa.array([[1]] * 301, pa.list_view(pa.int8()))
    for url, key, place in ((shards, pair.key, "shards"), (output, pair.output, "out")):
        publish_table(str(tmp_path / place), key, fetch_table(url, key).append_column("note", views))
    changed = pair_of(list_shards(str(tmp_path / "shards"))[0], pair.output, str(tmp_path / "out"))
    problems = verify_shard(schema, str(tmp_path / "shards"), changed, str(tmp_path / "out"))["problems"]
    assert len(problems) == 1 and "cannot be compared" in problems[0]


def test_each_input_has_one_output():
    shards = [Shard(f"{n}.parquet", "e", 1) for n in "abcd"]
    key = {s.key: output_key(s, "m", "s") for s in [*shards, Shard("gone.parquet", "e", 1)]}
    twice = output_key(shards[1]._replace(etag="older"), "m", "s")
    committed = [key["a.parquet"], key["b.parquet"], twice, key["d.parquet"], key["gone.parquet"]]
    pairs, problems = pairs_of(shards, committed, [Shard(k, "o", 2) for k in committed if k != key["d.parquet"]])
    assert pairs == [Pair("a.parquet", "e", 1, key["a.parquet"], "o", 2)]
    assert problems.pop(key["gone.parquet"])[0].startswith("its input is gone")
    assert problems == {
        "b.parquet": ["2 outputs in the table; expected one"],
        "c.parquet": ["0 outputs in the table; expected one"],
        "d.parquet": ["its output is in the table, but not in storage"],
    }
    assert source("a.parquet") in key["a.parquet"]


FLOATS = {pa.float16(): 16, pa.float32(): 32, pa.float64(): 64}


@st.composite
def columns(draw, depth: int = 2):
    """(Arrow type, strategy of its values)."""
    shape = draw(st.sampled_from(["float", "int", "text", "list", "fixed", "struct", "map"] if depth else ["float", "int", "text"]))
    if shape == "float":
        kind = draw(st.sampled_from(list(FLOATS)))
        return kind, st.floats(width=FLOATS[kind]).map(kind.to_pandas_dtype())
    if shape == "int":
        return pa.int64(), st.integers(-5, 5)
    if shape == "text":
        return draw(st.sampled_from([pa.string(), pa.large_string()])), st.text("ab", max_size=3)
    kind, value = draw(columns(depth - 1))
    value = st.none() | value
    if shape == "struct":
        return pa.struct([("a", kind), ("b", pa.int8())]), st.fixed_dictionaries({"a": value, "b": st.none() | st.integers(0, 3)})
    if shape == "map":
        return pa.map_(pa.string(), kind), st.lists(st.tuples(st.text("ab", max_size=2), value), max_size=3)
    if shape == "fixed":
        return pa.list_(kind, 2), st.lists(value, min_size=2, max_size=2)
    return draw(st.sampled_from([pa.list_, pa.large_list]))(kind), st.lists(value, max_size=3)


def exactly(value):
    """A value in a form whose equality is that of the bits, for floats; NaN is NaN."""
    if isinstance(value, float | np.floating):
        return "nan" if np.isnan(value) else np.float64(value).tobytes()
    if isinstance(value, list | tuple):
        return tuple(map(exactly, value))
    return tuple((k, exactly(v)) for k, v in value.items()) if isinstance(value, dict) else value


@settings(deadline=None)
@given(st.data())
def test_columns_differ_where_their_values_do(data):
    kind, value = data.draw(columns())
    rows = data.draw(st.lists(st.tuples(st.none() | value, st.none() | value, st.booleans()), max_size=8))
    a, b = [x for x, _, _ in rows], [x if same else y for x, y, same in rows]
    left, right = pa.array(a, kind), pa.array(b, kind)
    expected = [exactly(x) != exactly(y) for x, y in zip(left.to_pylist(), right.to_pylist(), strict=True)]
    assert differing(left, right).tolist() == expected
    start = data.draw(st.integers(0, len(rows)))
    assert differing(left.slice(start), right.slice(start)).tolist() == expected[start:]


def test_bits_tell_zeros_apart_and_not_the_payloads_of_nan():
    odd = np.array([0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    plain = pa.array(np.array([np.nan, np.nan], np.float32))
    assert not differing(pa.array(odd), plain).any()
    assert differing(pa.array([0.0]), pa.array([-0.0])).all()


OTHERS = {
    "decimal": (pa.array([1, 2, None]).cast(pa.decimal128(30, 2)), pa.array([1, 3, None]).cast(pa.decimal128(30, 2))),
    "timestamp": (pa.array([1, 2, None], pa.timestamp("ns", "UTC")), pa.array([1, 3, None], pa.timestamp("ns", "UTC"))),
    "duration": (pa.array([1, 2, None], pa.duration("us")), pa.array([1, 3, None], pa.duration("us"))),
    "bool": (pa.array([True, False, None]), pa.array([True, True, None])),
    "binary": (pa.array([b"a", b"b", None]), pa.array([b"a", b"c", None])),
    "view": (pa.array(["a", "b", None], pa.string_view()), pa.array(["a", "c", None], pa.string_view())),
    "fixed binary": (pa.array([b"a", b"b", None], pa.binary(1)), pa.array([b"a", b"c", None], pa.binary(1))),
    "dictionary": (
        pa.array(["a", "b", None]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([1, 0, None]), pa.array(["c", "a"])),  # the same text under another index
    ),
}
TENSOR = pa.fixed_shape_tensor(pa.float32(), [2])


@pytest.mark.parametrize("case", OTHERS)
def test_columns_of_other_types(case):
    assert differing(*OTHERS[case]).tolist() == [False, True, False]


def test_tensors_and_columns_of_nothing():
    tensors = [pa.ExtensionArray.from_storage(TENSOR, pa.array([[1.0, 2.0], [3.0, x], None], TENSOR.storage_type)) for x in (4.0, 5.0)]
    assert differing(*tensors).tolist() == [False, True, False]
    assert not differing(pa.nulls(3), pa.nulls(3)).any()


@settings(deadline=None)
@given(cohorts())
def test_what_enrich_writes_passes_for_every_type(cohort):
    table, schema = cohort
    out = enriched_schema(schema, table.schema, interval=False, draws=0, latent=False)
    for batch in table.to_batches():
        records = decode(batch, schema, "s")
        made = enrich(batch, out, schema, records, {name: said(x) for name, x in records.items()}, None)
        assert not any(input_problems(batch, made).values())
        assert not any(imputed_problems(schema, batch, made).values())
