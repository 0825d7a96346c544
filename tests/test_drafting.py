"""A drafted spec works as it is: it is read back, a model is fitted by it, and nothing that it names stays missing."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mmimpute import MultiModalImputer
from mmimpute.data import profile
from mmimpute.data.schema import draft_schema
from mmimpute.drafting import PLAIN, guess_spec, left_out, to_toml, without_free_text
from mmimpute.errors import UserError
from mmimpute.spec import CohortSpec, read_spec

SHARED = Path(__file__).parents[2] / "shared" / "data"
COHORTS = [pytest.param(SHARED / f"{n}.parquet", id=n, marks=pytest.mark.slow) for n in ("eicu_demo", "tcga_brca", "diabetes130", "pbcseq")]
FEW = 400


def drafted(table: pa.Table, path: Path) -> CohortSpec:
    """What `mmimpute describe` writes for a table, read back."""
    spec = guess_spec(table.schema)
    for _ in range(2):  # the second time without free text
        draft = draft_schema(spec, table.schema, {})
        seen = profile.observe(table, draft, "table", 1.0)
        spec, last = without_free_text(spec, draft, seen), spec
        if spec == last:
            break
    path.write_text(to_toml(spec, profile.settle(draft, seen)[0], left_out(spec, draft, table.schema)))
    return read_spec(path)


@pytest.mark.parametrize("file", [files("mmimpute") / "resources" / "nhanes2017.parquet", *COHORTS])
def test_a_draft_works_without_editing(file, tmp_path):
    if not file.is_file():
        pytest.skip("this cohort is not at hand")
    table = pq.read_table(str(file))
    table = table.filter(pa.array(~_repeated(table.column(0))))
    spec = drafted(table, tmp_path / "cohort.toml")
    few = table.slice(0, FEW)
    completed = MultiModalImputer(spec, epochs=1).fit_transform(few)
    inside = [c for m in spec.modalities.values() for c in table.column_names if c.startswith(m.prefix)]
    assert len(inside) >= table.num_columns - 12  # all but ids and outcomes
    assert sum(completed[c].null_count for c in inside) == 0 < sum(few[c].null_count for c in inside)


def _repeated(ids: pa.ChunkedArray) -> np.ndarray:
    """All but each subject's first record: pbcseq is of visits."""
    first = np.unique(ids.to_numpy(), return_index=True)[1]
    return ~np.isin(np.arange(len(ids)), first)


def test_columns_whose_names_tell_of_no_modality_are_one(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    plain = {"age": x + 50, "sodium": pc.if_else(pa.array(x > 0.5), None, pa.array(x)), "ward": [("a", "b")[i % 2] for i in range(60)]}
    table = pa.table({"person_id": range(60), **plain, "note": [f"seen {i} times" for i in range(60)], "outcome__died": [0, 1] * 30})
    spec = drafted(table, tmp_path / "cohort.toml")
    assert {name: m.features for name, m in spec.modalities.items()} == {PLAIN: ("age", "sodium", "ward")}  # the note is free text
    completed = MultiModalImputer(spec, epochs=1).fit_transform(table)
    assert completed["sodium"].null_count == 0 and completed["note"] == table["note"]


def test_a_table_of_nothing_that_can_be_modelled():
    with pytest.raises(UserError, match="no modality found: expected list columns or columns of numbers or text"):
        guess_spec(pa.schema([("subject_id", pa.string()), ("blob", pa.binary()), ("outcome__died", pa.int8())]))
