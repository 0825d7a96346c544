"""Images and signals as columns: there and back to the bit, in the types that the output contract names."""

import io
from math import prod

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmimpute.data import profile
from mmimpute.data.arrow import Imputation, decode, enrich, enriched_schema, in_columns, token_ids
from mmimpute.data.reference import reference
from mmimpute.data.schema import check_columns, draft_schema
from mmimpute.drafting import guess_spec, to_toml
from mmimpute.errors import DataError, UserError
from mmimpute.spec import CohortSpec, ModalitySpec

DIMENSIONS = {"image": 3, "signal": 2}


def column(form: str, x: np.ndarray, present: np.ndarray, layout: str) -> pa.Array:
    """x: N x shape, as a tensor or a list column."""
    inner = pa.uint8() if form == "image" else pa.float32()
    flat = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel(), inner), prod(x.shape[1:]), mask=pa.array(~present))
    if layout == "tensor":
        return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(inner, x.shape[1:]), flat)
    return flat if layout == "fixed" else flat.cast(pa.list_(inner))


@st.composite
def cohorts(draw):
    """A table with one image or signal modality and one of scalars, its schema, and the values N x shape."""
    form, layout = draw(st.sampled_from(list(DIMENSIONS))), draw(st.sampled_from(["tensor", "fixed", "list"]))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=DIMENSIONS[form], max_size=DIMENSIONS[form])))
    rows, rng = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.integers(0, 256, (rows, *shape)) if form == "image" else rng.normal(size=(rows, *shape)).astype(np.float32)
    present = rng.random(rows) < 0.6
    labs = pa.array(rng.normal(size=rows))
    table = pa.table({"subject_id": pa.array(range(rows)).cast(pa.string()), "scan": column(form, x, present, layout), "labs__a": labs})
    given_shape = {} if layout == "tensor" else {"shape": shape}
    modalities = {"scan": ModalitySpec(column="scan", form=form, **given_shape), "labs": ModalitySpec(prefix="labs__", kinds="real")}
    return table, draft_schema(CohortSpec(modalities=modalities), table.schema, {"scan": prod(shape)}), x, present


@settings(deadline=None, max_examples=50)
@given(cohorts())
def test_columns_to_arrays_and_back(cohort):
    table, schema, x, present = cohort
    modality = schema.modalities[0]
    assert modality.shape == x.shape[1:]
    read = decode(table, schema, "s")["scan"]
    assert np.array_equal(read[present].reshape(-1, *modality.shape), x[present]) and np.isnan(read[~present]).all()
    made = in_columns(modality, x.reshape(len(x), -1).astype(np.float32))["scan"]
    assert made.type.shape == list(modality.shape) and np.array_equal(made.to_numpy_ndarray(), x)


@settings(deadline=None, max_examples=50)
@given(cohorts())
def test_enriched_columns_keep_type_and_shape(cohort):
    table, schema, x, present = cohort
    records = decode(table, schema, "s")
    rows, width = len(x), prod(x.shape[1:])
    drawn = np.arange(2 * rows * width, dtype=np.float32).reshape(2, rows, width) % 256
    said = {
        name: Imputation(np.full(v.shape, 7.5), np.full(v.shape, 2.0), v * 0, v * 0, drawn[..., : v.shape[1]])
        for name, v in records.items()
    }
    out = enriched_schema(schema, table.schema, interval=True, draws=2, latent=False)
    (batch,) = table.to_batches()
    made = pa.Table.from_batches([enrich(batch, out, schema, records, said, None)])
    sink = io.BytesIO()
    pq.write_table(made, sink)
    stored = pq.read_table(io.BytesIO(sink.getvalue()))
    assert stored.schema.equals(made.schema) and stored.select(table.column_names).equals(table)
    assert not {"scan__lower", "scan__upper"} & set(stored.column_names)
    kind, draws = table.schema.field("scan").type, stored.schema.field("scan__draws").type.value_type
    image = schema.modalities[0].form == "image"
    assert (draws == kind) if image or isinstance(kind, pa.FixedShapeTensorType) else pa.types.is_float32(draws.value_type)
    if isinstance(kind, pa.FixedShapeTensorType):
        assert stored.schema.field("scan__imputed").type == pa.fixed_shape_tensor(pa.float32(), kind.shape)
    values = stored.column("scan__draws").to_pylist()
    assert [v is None for v in values] == present.tolist()
    assert all(np.array_equal(v, drawn[:, i]) for i, v in enumerate(values) if v is not None)


BASE = {"subject_id": pa.array(["a", "b"])}
PIXELS = np.arange(24).reshape(2, 1, 3, 4)
WRONG = {
    "no shape": (column("image", PIXELS, np.ones(2, bool), "fixed"), {"form": "image"}, "needs `shape` = [C, H, W]"),
    "another shape": (column("image", PIXELS, np.ones(2, bool), "tensor"), {"form": "image", "shape": (1, 4, 3)}, "shape [1, 3, 4]"),
    "as many values": (column("image", PIXELS, np.ones(2, bool), "fixed"), {"form": "image", "shape": (1, 3, 5)}, "lists of 12"),
    "floats": (pa.array([[0.5] * 12] * 2), {"form": "image", "shape": (1, 3, 4)}, "images are uint8"),
    "an image as a signal": (column("image", PIXELS, np.ones(2, bool), "tensor"), {"form": "signal"}, "needs `shape` = [T, C]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_image_is_told(case):
    values, settings_, message = WRONG[case]
    spec = CohortSpec(modalities={"scan": ModalitySpec(column="scan", **settings_)})
    with pytest.raises(UserError) as caught:
        draft_schema(spec, pa.table(BASE | {"scan": values}).schema, {"scan": 12})
    assert message in str(caught.value)


def test_a_shard_of_another_shape_is_set_aside():
    spec = CohortSpec(modalities={"scan": ModalitySpec(column="scan", form="image")})
    trained = pa.table(BASE | {"scan": column("image", PIXELS, np.ones(2, bool), "tensor")}).schema
    schema = draft_schema(spec, trained, {"scan": 12})
    check_columns(schema, trained, "s")
    turned = column("image", PIXELS.reshape(2, 1, 4, 3), np.ones(2, bool), "tensor")
    for other in (turned, pa.array([[0.5] * 12] * 2)):
        with pytest.raises(DataError, match=r"12 uint8 values of shape \[1, 3, 4\]"):
            check_columns(schema, pa.table(BASE | {"scan": other}).schema, "s")


def profiled(rows: int = 40):
    """Images whose upper left corner is always 0, and a signal with two channels of other scales."""
    rng = np.random.default_rng(0)
    x, wave = rng.integers(0, 256, (rows, 2, 4, 4)), rng.normal((0, 50), (1, 10), (rows, 8, 2)).astype(np.float32)
    x[:, :, 0, 0] = 0
    present = np.arange(rows) % 4 > 0
    scans = {"scan": column("image", x, present, "tensor"), "ecg": column("signal", wave, present, "tensor")}
    table = pa.table({"subject_id": pa.array(range(rows))} | scans | {"labs__a": rng.normal(size=rows)})
    spec = guess_spec(table.schema)
    draft = draft_schema(spec, table.schema, {"scan": 32, "ecg": 16})
    halves = [profile.observe(table.slice(at, rows // 2), draft, "s", 1.0) for at in (0, rows // 2)]
    return table, spec, *profile.settle(draft, profile.merge(*halves)), x[present], wave[present]


def test_statistics_are_those_of_the_channels():
    _, _, schema, seen, x, wave = profiled()
    found = profile.feature_statistics(schema, seen)
    for name, whole, axes in (("scan", x, (0, 2, 3)), ("ecg", wave, (0, 1))):
        for moment, value in (("mean", whole.mean(axes, keepdims=True)), ("std", whole.std(axes, keepdims=True))):
            np.testing.assert_allclose(found[name][moment], np.broadcast_to(value[0], whole.shape[1:]).ravel(), rtol=1e-5)
    assert not found["scan"]["log"].any() and found["scan"]["knots"].shape == (32, 9)


def test_no_record_tells_of_single_pixels():
    _, spec, schema, seen, x, _ = profiled()
    told = profile.report(schema, seen)["modalities"]
    assert [f["name"] for f in told["scan"]["features"]] == ["channel 0", "channel 1"] and told["scan"]["present"] == len(x)
    assert all(f["low"] is f["high"] is None for f in told["scan"]["features"])
    assert len(reference(schema, seen)["features"]) == 1  # labs__a
    text = to_toml(spec, schema, [])
    assert 'form = "image"\nshape = [2, 4, 4]' in text and 'form = "signal"\nshape = [8, 2]' in text and "f0" not in text


def noted(notes: list) -> tuple[pa.Table, CohortSpec]:
    table = pa.table({"subject_id": pa.array(range(len(notes))), "note": pa.array(notes, pa.string())})
    return table, CohortSpec(modalities={"note": ModalitySpec(column="note", form="text", shape=(4,), vocabulary=3)})


def test_the_vocabulary_holds_no_rare_word_and_is_the_same_whatever_the_shards():
    rare, common = profile.SMALLEST_GROUP - 1, profile.SMALLEST_GROUP
    notes = ["Fever; pain pain"] * common + ["fever, Nguyen-Smith!"] * rare + [None, ""] + ["cough cold chest"] * common
    table, spec = noted(notes)
    draft = draft_schema(spec, table.schema, {})
    parts = [profile.observe(table.slice(at, 15), draft, "s", 1.0) for at in range(0, len(notes), 15)]
    total = parts[0]
    for part in parts[1:]:
        total = profile.merge(total, part)
    schema, seen = profile.settle(draft, total)
    assert schema.modalities[0].vocabulary == ("fever", "chest", "cold")  # three at most, by records, then by name
    assert sum(schema.modalities[0].chances) == pytest.approx(1) and min(schema.modalities[0].chances) > 0
    x = decode(table, schema, "s")["note"]
    assert x[0].tolist() == [1, 0, 0, 0] and x[-1].tolist() == [3, 2, 0, 0] and np.isnan(x[notes.index(None)]).all()
    assert not x[notes.index("")].any()
    told = profile.report(schema, seen)["modalities"]["note"]
    assert told["present"] == len(notes) - 1 and "Nguyen" not in str(told).title()


def test_a_text_without_any_common_word_is_told():
    table, spec = noted(["a b", "c d"])
    draft = draft_schema(spec, table.schema, {})
    with pytest.raises(UserError, match="no token is in 10 records or more"):
        profile.settle(draft, profile.observe(table, draft, "s", 1.0))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "3", "é"]), max_size=4), min_size=1, max_size=5))
def test_texts_to_ids_and_back(words):
    table, spec = noted([" ".join(w) for w in words])
    modality = draft_schema(spec, table.schema, {}).modalities[0].model_copy(update={"vocabulary": ("é", "b", "a", "3")})
    made = in_columns(modality, token_ids(table["note"], modality))["note"]
    assert made.equals(table["note"].combine_chunks())
