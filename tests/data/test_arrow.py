"""Arrow to arrays and back: what was observed comes back bit for bit, whatever the layout."""

import datetime
import decimal
import io
import math
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmimpute.data.arrow import Imputation, check_subjects, decode, enrich, enriched_schema, in_columns, texts
from mmimpute.data.schema import CohortSchema, Feature, Modality, check_columns, draft_schema
from mmimpute.drafting import guess_spec
from mmimpute.errors import DataError
from mmimpute.spec import CohortSpec, ModalitySpec

MOST = float(np.finfo(np.float32).max)  # the model's floats
FLOATS = {"float": 32, "double": 64, "halffloat": 16}
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"]
LEVELS = ("low", "middle", "high")


def numbers(kind: str):
    if kind in FLOATS:
        bounds = (-MOST, MOST) if kind == "double" else ()
        return st.floats(*bounds, width=FLOATS[kind], allow_nan=False, allow_infinity=False)
    if kind == "bool":
        return st.booleans()
    bits = int(kind.lstrip("uint") or 0)
    return st.integers(0, 2 ** min(bits - 1, 52) - 1)


@st.composite
def list_columns(draw, rows: int):
    kind, width = draw(st.sampled_from([*FLOATS, "int32"])), draw(st.integers(1, 4))
    value = pa.float16() if kind == "halffloat" else pa.type_for_alias(kind)
    layout = draw(st.sampled_from(["list", "large_list", "fixed"]))
    kinds = {"list": pa.list_(value), "large_list": pa.large_list(value), "fixed": pa.list_(value, width)}
    element = st.none() | numbers(kind)
    values = draw(st.lists(st.none() | st.lists(element, min_size=width, max_size=width), min_size=rows, max_size=rows))
    return pa.array(values, kinds[layout]), width


@st.composite
def scalar_columns(draw, rows: int):
    kind = draw(st.sampled_from(["float", "double", "bool", "string", "dictionary", *WHOLE]))
    if kind in ("string", "dictionary"):
        values = pa.array(draw(st.lists(st.none() | st.sampled_from(LEVELS), min_size=rows, max_size=rows)), pa.string())
        return values.dictionary_encode() if kind == "dictionary" else values
    return pa.array(draw(st.lists(st.none() | numbers(kind), min_size=rows, max_size=rows)), kind)


@st.composite
def cohorts(draw):
    """A table and its spec: one list modality, one of scalars; sliced, and in several chunks."""
    rows = draw(st.integers(1, 12))
    ids = draw(st.sampled_from([pa.int64(), pa.string(), pa.large_string()]))
    lists, width = draw(list_columns(rows))
    columns = {"subject_id": pa.array(range(rows)).cast(pa.string() if ids != pa.int64() else ids).cast(ids), "x": lists}
    scalars = [draw(scalar_columns(rows)) for _ in range(draw(st.integers(1, 3)))]
    columns |= {f"s__{i}": c for i, c in enumerate(scalars)}
    table = pa.table(columns)
    start = draw(st.integers(0, rows - 1))
    cut = draw(st.integers(start, rows))
    table = pa.concat_tables([table.slice(start, cut - start), table.slice(cut)])
    levels = {str(i): LEVELS for i, c in enumerate(scalars) if pa.types.is_string(c.type) or pa.types.is_dictionary(c.type)}
    spec = CohortSpec(modalities={"x": ModalitySpec(column="x"), "s": ModalitySpec(prefix="s__", levels=levels)})
    return table, draft_schema(spec, table.schema, {"x": width})


def same(found, expected) -> bool:
    """Equal to the bit, for floats of either width."""
    if isinstance(expected, float):
        return math.copysign(1, found) == math.copysign(1, expected) and found == expected
    return found == expected


def said(x: np.ndarray, draws: int = 0) -> Imputation:
    """The same of every value: 1, with a standard deviation of 0.5, between 0.25 and 1.5."""
    mean, std, lower, upper = (np.full_like(x, v) for v in (1, 0.5, 0.25, 1.5))
    return Imputation(mean, std, lower, upper, np.ones((draws, *x.shape), x.dtype) if draws else None)


@settings(max_examples=150, deadline=None)
@given(cohorts())
def test_input_columns_and_observed_values_come_back(cohort):
    table, schema = cohort
    out = enriched_schema(schema, table.schema, interval=True, draws=2, latent=True)
    at, batches = 0, []
    for batch in table.to_batches():
        records = decode(batch, schema, "s")
        imputed = {n: said(x, draws=2) for n, x in records.items()}
        batches.append(enrich(batch, out, schema, records, imputed, np.zeros((len(batch), 3))))
        at += len(batch)
    enriched = pa.Table.from_batches(batches, out)
    for name in table.column_names:
        assert enriched.column(name).combine_chunks().equals(table.column(name).combine_chunks())
    for modality in schema.modalities:
        columns = [table.column(c).to_pylist() for c in modality.columns]
        for row in range(len(table)):
            check_row(modality, enriched, row, [c[row] for c in columns])


def check_row(modality: Modality, enriched: pa.Table, row: int, cells: list) -> None:
    values = cells[0] if modality.layout == "list" else cells
    width = len(modality.features)
    missing = [v is None for v in values] if values is not None else [True] * width
    for at, column in enumerate(modality.columns):
        text = modality.layout == "scalars" and modality.features[at].levels
        assert (column + "__lower" in enriched.column_names) == (column + "__upper" in enriched.column_names) == (not text)
        suffixes = ("__imputed", "__std", *(() if text else ("__lower", "__upper")))
        *cells, draws = (enriched.column(column + s)[row].as_py() for s in (*suffixes, "__draws"))
        if not any(missing):
            assert draws is None and not any(c is not None for c in cells)
            continue
        scalar = [(values[at], *cells)] if modality.layout == "scalars" else None
        for observed, completed, spread, *bounds in scalar or zip(values or [None] * width, *cells, strict=True):
            assert spread == (0.5 if observed is None else 0)
            assert observed is None or all(same(v, observed) for v in (completed, *bounds))
            assert observed is not None or bounds == ([] if text else [0.25, 1.5])
        assert len(draws) == 2


def table_of(**columns) -> pa.Table:
    return pa.table({"subject_id": ["a", "b", "c"], **columns})


def schema_of(table: pa.Table, kind: str = "auto", levels=(), width: int = 2) -> CohortSchema:
    levels = {"f0" if "x" in table.column_names else "v": levels} if levels else {}
    modality = (
        ModalitySpec(column="x", kinds=kind, levels=levels)
        if "x" in table.column_names
        else ModalitySpec(prefix="s__", kinds=kind, levels=levels)
    )
    return draft_schema(CohortSpec(modalities={"m": modality}), table.schema, {"x": width})


def bounds_of(table: pa.Table, schema: CohortSchema) -> pa.Table:
    """The columns that an interval adds."""
    records = decode(table, schema, "s")
    out = enriched_schema(schema, table.schema, interval=True, draws=0, latent=False)
    (batch,) = table.to_batches()
    enriched = pa.Table.from_batches([enrich(batch, out, schema, records, {"m": said(records["m"])}, None)])
    return enriched.select([c for c in enriched.column_names if c.endswith(("__lower", "__upper"))])


BOUNDS = {
    "list": (table_of(x=[[7.0, None], [1.0, 2.0], None]), "real", (), [[7, 0.25], None, [0.25, 0.25]], [[7, 1.5], None, [1.5, 1.5]]),
    "scalar": (table_of(s__v=[7, None, 8]), "count", (), [None, 0.25, None], [None, 1.5, None]),
    "ordinal": (table_of(s__v=[10, None, 40]), "ordinal", (10.0, 20.0, 40.0), [None, 12.5, None], [None, 30, None]),
    "ordinal in a list": (
        table_of(x=[[40.0, None], [10.0, 20.0], None]),
        ("ordinal", "real"),
        (10.0, 20.0, 40.0),
        [[40, 0.25], None, [12.5, 0.25]],
        [[40, 1.5], None, [30, 1.5]],
    ),
    "binary": (table_of(s__v=[1, None, 0]), "binary", (), [None] * 3, [None] * 3),
    "categorical": (table_of(s__v=[10, None, 20]), "categorical", (10.0, 20.0), [None] * 3, [None] * 3),
    "binary in a list": (
        table_of(x=[[1.0, None], [1.0, 2.0], None]),
        ("binary", "real"),
        (),
        [[None, 0.25], None, [None, 0.25]],
        [[None, 1.5], None, [None, 1.5]],
    ),
}


@pytest.mark.parametrize("case", BOUNDS)
def test_bounds(case):
    table, kind, levels, lower, upper = BOUNDS[case]
    found = bounds_of(table, schema_of(table, kind, levels))
    assert [c.to_pylist() for c in found.columns] == [lower, upper]


def test_bounds_are_copied_inside_a_modality_that_lacks_another_value():
    table = table_of(s__v=[7.0, None, 8.0], s__w=[None, 1.0, 2.0])
    found = bounds_of(table, schema_of(table))
    assert found["s__v__lower"].to_pylist() == [7, 0.25, None] and found["s__w__upper"].to_pylist() == [1.5, 1, None]


def test_columns_of_an_enriched_shard():
    table = table_of(s__v=pa.array([1, None, 3], pa.int8()), s__t=["low", None, "high"])
    spec = CohortSpec(modalities={"s": ModalitySpec(prefix="s__", levels={"t": LEVELS})})
    out = enriched_schema(draft_schema(spec, table.schema, {}), table.schema, interval=True, draws=2, latent=True)
    v = [f"s__v__{s}" for s in ("imputed", "std", "lower", "upper", "draws")]
    assert out.names == ["subject_id", "s__v", "s__t", *v, "s__t__imputed", "s__t__std", "s__t__draws", "from_prior", "z0"]
    assert {str(out.field(c).type) for c in v[:4]} == {"float"}


def test_a_feature_may_be_called_upper():
    table = table_of(limbs__lower=[1.0, 2.0, None], limbs__upper=[1.0, 2.0, None], labs__na=[1.0, 2.0, None], labs__na__upper=[1.0] * 3)
    spec = guess_spec(table.schema)
    assert [m.columns for m in draft_schema(spec, table.schema, {}).modalities] == [("limbs__lower", "limbs__upper"), ("labs__na",)]


BAD = {
    "wrong length": (table_of(x=[[1.0, 2.0], [1.0], None]), "auto", (), "1 lists of another length"),
    "infinity": (table_of(s__v=[1.0, np.inf, None]), "auto", (), "1 infinite values"),
    "beyond the model's floats": (table_of(s__v=[1.0, np.finfo(float).max, None]), "auto", (), "1 infinite values, or beyond 3.4e38"),
    "infinity in a list": (table_of(x=[[1.0, -np.inf], None, None]), "auto", (), "x[f1]"),
    "unknown text": (table_of(s__v=["low", "huge", None]), "categorical", LEVELS, "1 values of no known level"),
    "unknown number": (table_of(s__v=[1.0, 2.0, 7.0]), "ordinal", (1.0, 2.0), "1 values of no known level"),
    "no binary": (table_of(s__v=[0, 1, 2]), "binary", (), "1 values other than 0 and 1"),
    "negative count": (table_of(s__v=[0, -1, 2]), "count", (), "1 values that are no counts"),
    "broken count": (table_of(s__v=[0, 0.5, 2]), "count", (), "1 values that are no counts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_told_without_their_value(case):
    table, kind, levels, message = BAD[case]
    with pytest.raises(DataError) as caught:
        decode(table, schema_of(table, kind, levels), "part-7.parquet")
    assert "part-7.parquet" in str(caught.value)
    assert message in str(caught.value)
    assert "huge" not in str(caught.value)


def test_nan_is_missing():
    records = decode(table_of(s__v=[1.0, np.nan, None]), schema_of(table_of(s__v=[1.0, 2.0, None])), "s")
    assert np.isnan(records["m"][:, 0]).tolist() == [False, True, True]


def test_whole_numbers_beyond_a_double_are_rounded_not_refused():
    table = table_of(s__v=[2**60 + 1, 1, None])
    assert decode(table, schema_of(table), "s")["m"][:2, 0].tolist() == [2.0**60, 1.0]


def test_subject_ids():
    with pytest.raises(DataError, match="2 repeated subject ids"):
        check_subjects(pa.chunked_array([["a", "b", "a", "a"]]), "subject_id", "s")
    with pytest.raises(DataError, match="1 null subject ids"):
        check_subjects(pa.chunked_array([["a", None]]), "subject_id", "s")
    with pytest.raises(DataError, match="no records"):
        check_subjects(pa.chunked_array([[]], pa.string()), "subject_id", "s")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"y": [1.0]}, "no such column"),
        ({"x": ["text"]}, "expected lists of 2 numbers"),
        ({"x": [1.0]}, "expected lists of 2 numbers"),
        ({"x": pa.array([[1.0, 2.0, 3.0]], pa.list_(pa.float32(), 3))}, "expected lists of 2 numbers"),
        ({"x": [[1.0, 2.0]], "x__imputed": [[1.0, 2.0]]}, "raw records"),
    ],
)
def test_footer_checks(column, message):
    schema = schema_of(table_of(x=[[1.0, 2.0], None, None]))
    with pytest.raises(DataError, match=message):
        check_columns(schema, pa.table({"subject_id": ["a"], **column}).schema, "s")


class Planted:
    """What a pickle can do where it is read: call anything."""

    def __reduce__(self):
        return pytest.fail, ("a shard ran code",)


def wrapped(array: pa.Array, layout: str) -> pa.Array:
    if layout == "list":
        return pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), array)
    return pa.StructArray.from_arrays([array], ["inside"]) if layout == "struct" else array


@pytest.mark.parametrize("ray_knows", [True, False])
@pytest.mark.parametrize("layout", ["alone", "list", "struct"])
@pytest.mark.parametrize("column", ["subject_id", "x", "note"])
def test_a_column_that_could_run_code_is_refused(column, layout, ray_knows):
    """The note is carried through: whoever reads the enriched table would run it."""
    from ray.data.extensions import ArrowPythonObjectType

    planted = pa.array([pickle.dumps(Planted())], pa.large_binary())
    values = wrapped(pa.ExtensionArray.from_storage(ArrowPythonObjectType(), planted), layout)
    sink = io.BytesIO()
    pq.write_table(pa.table({"subject_id": ["a"], "x": [[1.0, 2.0]]} | {column: values}), sink)
    if not ray_knows:
        pa.unregister_extension_type(ArrowPythonObjectType().extension_name)
    try:
        arrow = pq.read_schema(pa.BufferReader(sink.getvalue()))
        with pytest.raises(DataError, match=f"{column}.*pickled") as caught:
            check_columns(schema_of(table_of(x=[[1.0, 2.0], None, None])), arrow, "s")
    finally:
        if not ray_knows:
            pa.register_extension_type(ArrowPythonObjectType())
    assert "ran code" not in str(caught.value)


def test_ids_of_types_that_python_defines_are_refused_and_uuids_are_not():
    from ray.data.extensions import ArrowTensorTypeV2

    schema = schema_of(table_of(x=[[1.0, 2.0], None, None]))
    features = pa.field("x", pa.list_(pa.float64()))
    check_columns(schema, pa.schema([("subject_id", pa.uuid()), features]), "s")
    for kind in (ArrowTensorTypeV2((1,), pa.int64()), pa.fixed_shape_tensor(pa.int64(), (1,)), pa.list_(pa.int64())):
        with pytest.raises(DataError, match="ids of text or numbers"):
            check_columns(schema, pa.schema([("subject_id", kind), features]), "s")


def test_tensor_columns_are_lists():
    tensor = pa.fixed_shape_tensor(pa.float32(), (2,))
    storage = pa.array([[1.0, 2.0], None, [3.0, None]], pa.list_(pa.float32(), 2))
    table = table_of(x=pa.ExtensionArray.from_storage(tensor, storage))
    records = decode(table, schema_of(table), "s")
    np.testing.assert_array_equal(records["m"], [[1, 2], [np.nan, np.nan], [3, np.nan]])


def test_synthetic_values_take_the_cohorts_types():
    features = (
        Feature(name="v", kind="real"),
        Feature(name="o", kind="ordinal", levels=(10.0, 20.0)),
        Feature(name="t", kind="categorical", levels=LEVELS),
    )
    modality = Modality(
        name="m",
        layout="scalars",
        columns=("m__v", "m__o", "m__t"),
        types=("int8", "double", "string"),
        features=features,
        impute=True,
        hide=0.5,
        tails="student",
    )
    columns = in_columns(modality, np.array([[300.4, 1, 2], [-1.6, 0, 0]]))
    assert [c.to_pylist() for c in columns.values()] == [[127, -2], [20.0, 10.0], ["high", "low"]]
    assert [str(c.type) for c in columns.values()] == ["int8", "double", "string"]


def test_what_is_beside_the_model_is_read_as_text():
    days = [datetime.datetime(2020, 3, 5, 8, tzinfo=datetime.UTC), None]
    table = pa.table(
        {
            "at": pa.array(days, pa.timestamp("us", "UTC")),
            "day": pa.array([d and d.date() for d in days]),
            "sex": pa.array(["f", None]).dictionary_encode(),
            "died": pa.array([True, None]),
            "code": pa.array([1.0, None]),
            "price": pa.array([decimal.Decimal("1.5"), None]),
        }
    )
    found = {name: texts(table, name).tolist() for name in (*table.column_names, "none")}
    assert found["at"][0].startswith("2020-03-05 08:00:00") and found["day"] == ["2020-03-05", ""]
    assert (found["sex"], found["died"], found["code"], found["price"]) == (["f", ""], ["true", ""], ["1", ""], ["1.5", ""])
    assert found["none"] == ["", ""] and all(values[1] == "" for values in found.values())
