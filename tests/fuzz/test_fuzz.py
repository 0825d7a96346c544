"""Whatever comes from outside, the answer is a result or one of the documented errors, and names nobody.

`make fuzz` tries 20,000 inputs on each; CI a few.
"""

import io
import json
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mmimpute import registry
from mmimpute.data import profile, storage
from mmimpute.data.arrow import decode
from mmimpute.data.schema import draft_schema
from mmimpute.data.shards import list_shards, read_footer
from mmimpute.drops import notified
from mmimpute.errors import DataError, MmimputeError, UserError
from mmimpute.imputing import impute_shard, predict
from mmimpute.spec import CohortSpec, ImputeSettings, RunConfig, read_config, read_rules, read_spec, validated
from tests.conftest import SPEC, linear_cohort
from tests.fuzz.mutations import VALUES, damaged_bytes, damaged_tree

EXAMPLES = int(os.environ.get("MMIMPUTE_FUZZ", "25"))
CHECKS = list(HealthCheck)
fuzz = settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 1000, suppress_health_check=CHECKS)
RUN = {"title": "t", "spec": tomllib.loads(SPEC), "shards": "s3://b/c", "model": "s3://b/m", "output": "s3://b/e", "fit": {"epochs": 2}}
RULE = {"feature": "rna[f0]", "at_least": 1.0, "probability": 0.8, "where": {"dx__code": {"equals": 1}}, "message": "m"}
RULES = {"rules": {"high": RULE}}
CONTRAST = {"on": ["z0", "rna"], "temperature": 0.2, "labels": {"outcome__died": 1, "age": {"bins": 3, "weight": 0.5}}}
S3_EVENT = {"Records": [{"eventVersion": "2.1", "s3": {"bucket": {"name": "b"}, "object": {"key": "c/part+1.parquet", "eTag": "e"}}}]}
ENVELOPES = ({"Message": json.dumps(S3_EVENT)}, {"Records": [{"body": json.dumps(S3_EVENT)}]}, {"detail": {"bucket": {}, "object": {}}})
EVENTS = (S3_EVENT, *ENVELOPES)
IDS = "s000"  # how every subject id of the cohort begins


def tried(expected: type[MmimputeError] | tuple[type[MmimputeError], ...], call, *arguments):
    """What the call returns, or None where it raised what is expected."""
    try:
        found = call(*arguments)
    except expected as error:
        assert IDS not in str(error)
        event(f"refused: {type(error).__name__}")
        return None
    event("accepted")
    return found


@pytest.fixture(scope="module")
def model(small_cohort, tmp_path_factory) -> Path:
    """A copy of the model's directory, to damage."""
    home = shutil.copytree(small_cohort[2], tmp_path_factory.mktemp("fuzz") / "home")
    return Path(registry.locate(str(home)))


@fuzz
@given(damaged_bytes(SPEC.encode()))
def test_spec_files(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz.toml"
    file.write_bytes(content)
    for read in (read_spec, read_config, read_rules):
        tried(UserError, read, file)


@fuzz
@given(damaged_tree(tomllib.loads(SPEC) | {"contrastive": CONTRAST}))
def test_specs_on_a_cohort(values):
    spec = tried(UserError, validated, CohortSpec, values, "cohort.toml")
    table = linear_cohort(20)
    schema = spec and tried(UserError, draft_schema, spec, table.schema, {"labs": 4, "rna": 6})
    if schema:
        tried((UserError, DataError), lambda: profile.settle(schema, profile.observe(table, schema, "shard", 1.0)))


@fuzz
@given(damaged_tree(RUN), damaged_tree(RULES))
def test_run_files(values, rules):
    tried(UserError, validated, RunConfig, values | {"alerts": rules, "alerts_to": "s3://b/a"}, "run.toml")


@fuzz
@given(st.data())
def test_model_files(model, data):
    good = {name: (model / name).read_bytes() for name in ("model.json", "model.safetensors")}
    name = data.draw(st.sampled_from(["model.json", "tree", "model.safetensors"]))
    content = data.draw(damaged_tree(json.loads(good["model.json"])) if name == "tree" else damaged_bytes(good[name]))
    try:
        path = model / ("model.json" if name == "tree" else name)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        loaded = tried(UserError, registry.load, str(model))
        if loaded is not None:
            tried(DataError, _imputed, loaded)
    finally:
        for file, content in good.items():
            (model / file).write_bytes(content)


def _imputed(model: registry.Model) -> None:
    table = linear_cohort(3)
    if set(model.schema.columns) <= set(table.column_names):
        predict(model, decode(table, model.schema, "shard"), ImputeSettings(draws=2), torch.Generator())


@fuzz
@given(st.data())
def test_files_beside_the_model(model, data):
    for name, good in (("champion.json", {"digest": model.name, "former": [model.name]}), ("gate.json", {"reason": "better"})):
        place = model.parent if name == "champion.json" else model
        content = data.draw(damaged_bytes(json.dumps(good).encode()) | damaged_tree(good).map(lambda t: json.dumps(t).encode()))
        (place / name).write_bytes(content)
    tried(UserError, registry.locate, str(model.parent))
    tried(UserError, registry.listed, str(model.parent))


@pytest.fixture(scope="module")
def shard(small_cohort, tmp_path_factory):
    """(a model of the small cohort, the bytes of one of its shards, a folder)."""
    url, _, home = small_cohort
    return registry.load(home), (Path(url) / "part-000.parquet").read_bytes(), tmp_path_factory.mktemp("shards")


def imputed(shard, content: bytes) -> str | None:
    """Why a shard of these bytes is set aside."""
    model, _, folder = shard
    storage.write(str(folder / "in"), "part.parquet", content)
    (found,) = list_shards(str(folder / "in"))
    tried(DataError, read_footer, str(folder / "in"), found)
    error = impute_shard(model, str(folder / "in"), found, str(folder / "out"), ImputeSettings())["error"]
    assert IDS not in str(error)
    event("refused: DataError" if error else "accepted")
    return error


@fuzz
@given(st.data())
def test_bytes_of_shards(shard, data):
    imputed(shard, data.draw(damaged_bytes(shard[1])))


def columns(rows: int) -> st.SearchStrategy[pa.Array]:
    """A column of any type, with any values."""
    numbers = st.lists(st.none() | st.floats(width=32), min_size=rows, max_size=rows)
    return st.one_of(
        numbers.map(pa.array),
        numbers.map(lambda v: pa.array(np.array(v, float), pa.float32())),
        st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows).map(lambda v: pa.array(v, pa.int64())),
        st.lists(st.none() | st.text(max_size=4), min_size=rows, max_size=rows).map(lambda v: pa.array(v, pa.string())),
        st.lists(st.none() | st.binary(max_size=4), min_size=rows, max_size=rows).map(lambda v: pa.array(v, pa.binary())),
        st.lists(st.booleans(), min_size=rows, max_size=rows).map(pa.array),
        st.lists(st.none() | st.lists(st.none() | st.floats(), max_size=7), min_size=rows, max_size=rows).map(
            lambda v: pa.array(v, pa.list_(pa.float64()))
        ),
        st.lists(st.none() | st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=rows, max_size=rows).map(
            lambda v: pa.array(v, pa.list_(pa.float64(), 4))
        ),
        st.just(pa.nulls(rows)),
        st.just(pa.array([{"a": 1}] * rows)),
        st.lists(st.dates(), min_size=rows, max_size=rows).map(pa.array),
        st.just(pa.array(["colon", "lung"] * rows)[:rows].dictionary_encode()),
    )


@fuzz
@given(st.data())
def test_schemas_of_shards(shard, data):
    table = linear_cohort(data.draw(st.integers(0, 4)))
    for name in data.draw(st.lists(st.sampled_from(table.column_names), min_size=1, max_size=3, unique=True)):
        at = table.column_names.index(name)
        change = data.draw(st.sampled_from(["drop", "replace", "double", "extra"]))
        if change == "drop" and table.num_columns > 1:
            table = table.remove_column(at)
        elif change == "double":
            table = table.append_column(name, table.column(at))
        else:
            name = name if change == "replace" else name + data.draw(st.sampled_from(["__imputed", "__x", ""]))
            table = table.set_column(at, name, data.draw(columns(len(table))))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    imputed(shard, sink.getvalue())


@fuzz
@given(st.one_of(*(damaged_tree(e) for e in EVENTS), VALUES))
def test_event_messages(message):
    found = tried(UserError, notified, message)
    assert found is None or all(url.startswith("s3://") for url in found)


def test_a_model_larger_than_its_weights_is_refused_before_it_takes_memory(model):
    """A decompression bomb: settings of a few bytes that ask for terabytes."""
    path, good = model / "model.json", (model / "model.json").read_text()
    for bomb in ({"hidden": 1 << 20}, {"shared": 1 << 24}, {"decoder": 1 << 30}, {"members": 1 << 40}, {"hidden": 1 << 62}):
        content = json.loads(good)
        content["config"].update(bomb)
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="a damaged model"):
            registry.load(str(model))
    path.write_text(good)
    registry.load(str(model))


@fuzz
@given(st.none())
def test_the_shard_that_is_damaged_was_good(shard, _):
    assert imputed(shard, shard[1]) is None
