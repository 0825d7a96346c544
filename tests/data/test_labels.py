"""Labels: settled on a sample, read from shards, and of classes."""

import numpy as np
import pyarrow as pa
import pytest

from mmimpute.data import labels
from mmimpute.data.arrow import texts
from mmimpute.data.schema import Contrastive, Label, draft_schema
from mmimpute.errors import DataError, UserError
from mmimpute.spec import CohortSpec

ROWS = 200


def table() -> pa.Table:
    rng = np.random.default_rng(0)
    age = rng.normal(50, 10, ROWS)
    age[:20] = np.nan
    stage = rng.choice([1.0, 2.0, 4.0], ROWS)
    stage[:3] = 7  # too few people
    columns = {
        "age": pa.array(age, from_pandas=True),
        "stage": pa.array(stage),
        "site": pa.array(["rare" if i < 5 else None if i < 20 else "abc"[i % 3] for i in range(ROWS)]),
        "flag": pa.array([bool(i % 2) for i in range(ROWS)]),
        "same": pa.array([1.0] * ROWS),
    }
    return pa.table({"subject_id": pa.array(range(ROWS)), "labs__a": pa.array(rng.normal(size=ROWS)), **columns})


def settled(**given) -> Contrastive:
    kinds = {"text": False, "weight": 1.0, "bins": 4, "soft": False}
    found = tuple(Label(column=c, **(kinds | own)) for c, own in given.items())
    draft = Contrastive(labels=found, temperature=0.1, weight=0.1, alone=False, on=("z0",))
    return labels.settle(draft, {c: texts(table(), c) for c in given})


def encoded(**given) -> np.ndarray:
    return labels.encode(table(), settled(**given), "s")


def test_numbers_are_binned_with_as_many_people_each():
    (found,) = encoded(age={}).T
    assert np.isnan(found[:20]).all()
    assert np.bincount(found[20:].astype(int)).tolist() == [45] * 4


def test_a_soft_label_is_standardised():
    (found,) = encoded(age={"soft": True}).T
    assert np.nanmean(found) == pytest.approx(0, abs=1e-6) and np.nanstd(found) == pytest.approx(1, abs=1e-6)


def test_few_values_are_levels_and_those_of_few_people_say_nothing():
    stage, site, flag = encoded(stage={}, site={"text": True}, flag={}).T
    values = np.array([1.0, 2.0, 4.0])
    assert np.array_equal(values[stage[3:].astype(int)], table().column("stage").to_numpy()[3:])
    assert np.isnan(stage[:3]).all() and np.isnan(site[:20]).all()
    assert [f"{'abc'[int(s)]}" for s in site[20:26]] == [table().column("site")[i].as_py() for i in range(20, 26)]
    assert flag.tolist() == [i % 2 for i in range(ROWS)]


def test_a_shard_without_the_column_has_no_labels_and_one_of_another_type_is_bad():
    kept = settled(age={}, site={"text": True})
    found = labels.encode(table().drop_columns(["age"]), kept, "s")
    assert np.isnan(found[:, 0]).all() and not np.isnan(found[20:, 1]).any()
    with pytest.raises(DataError, match="expected text"):
        labels.encode(table().set_column(4, "site", pa.array([1.0] * ROWS)), kept, "s")


@pytest.mark.parametrize("given", [{"same": {}}, {"same": {"soft": True}}, {"age": {"bins": 30}}])
def test_a_label_that_tells_nobody_apart(given):
    with pytest.raises(UserError, match=r"contrastive\.labels: column"):
        settled(**given)


def test_labels_are_no_inputs():
    def schema(**contrastive):
        modalities = {"all": {"prefix": "a"}, "labs": {"prefix": "labs__"}}
        return draft_schema(CohortSpec.model_validate({"modalities": modalities, "contrastive": contrastive}), wide.schema, {})

    wide = table().append_column("a1", pa.array([1.0] * ROWS)).append_column("when", pa.array([0] * ROWS, pa.timestamp("s")))
    assert schema(labels={"age": 1}).modalities[0].columns == ("a1",)
    for column, problem in {"nowhere": "not in the shards", "when": "expected numbers or text"}.items():
        with pytest.raises(UserError, match=problem):
            schema(labels={column: 1})
    with pytest.raises(UserError, match="no near values"):
        schema(labels={"site": {"soft": True}})


def test_classes():
    found = np.array(["1"] * 10 + ["0.0"] * 8 + ["false"] * 2 + ["1.0", "true", "", "nan"], object)
    assert labels.classes(found, "died")[0] == ("0", "1")
    assert labels.classes(found, "died")[1].tolist() == [1] * 10 + [0] * 10 + [1, 1, -1, -1]
    levels, index = labels.classes(np.array(["LumA"] * 12 + ["Her2"] * 11 + ["rare"] * 9, object), "pam50")
    assert levels == ("Her2", "LumA") and set(index[23:]) == {-1}
    with pytest.raises(UserError, match="fewer than two classes with 10"):
        labels.classes(np.array(["1"] * 50 + ["0"] * 9, object), "died")
    with pytest.raises(UserError, match="80 values"):
        labels.classes(np.arange(80).astype(str).astype(object), "age")
