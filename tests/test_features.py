"""The Feast repo: what is generated, and Feast itself on it, in an environment of its own, on a table in the object store."""

import ast
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmimpute import features, jobs, planning, registry
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.table import Snapshot
from mmimpute.errors import UserError
from mmimpute.exporting import Features, View, features_of
from mmimpute.imputing import impute_shard
from mmimpute.spec import ImputeSettings
from tests.conftest import SPEC, linear_cohort, untrained_model
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "feast"
SETTINGS = ImputeSettings(latent=True)
FIRST, END, LAST = (datetime(year, 1, 1, tzinfo=UTC) for year in (2019, 2023, 2024))  # END: of materialisation
LISTS = ("labs", "rna")
COLUMNS = (*LISTS, "dx__code", "dx__stage", "dx__site")


@pytest.fixture
def generated(small_cohort):
    """Features of the small cohort's table, were it in a bucket."""
    lists = [(c + s, pa.list_(pa.float32())) for c in ("labs", "rna") for s in ("__imputed", "__std")]
    numbers = [(c + s, pa.float64()) for c in ("dx__code", "dx__stage") for s in ("__imputed", "__std")]
    text = [("dx__site__imputed", pa.string()), ("dx__site__std", pa.float32()), ("z0", pa.list_(pa.float32()))]
    schema = registry.describe(small_cohort[2]).cohort.model_copy(update={"timestamp": "index_date"})
    return features_of(schema, "s3://bucket/enriched", Snapshot(12, pa.schema([*lists, *numbers, *text]), {}))


def test_golden_repo(generated, tmp_path):
    features.write_repo(tmp_path, generated)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {p.name: p.read_text() for p in GOLDEN.iterdir()}


def test_a_second_call_leaves_the_settings_alone(generated, tmp_path):
    features.write_repo(tmp_path, generated)
    (tmp_path / "feature_store.yaml").write_text("mine")
    (tmp_path / "features.py").write_text("old")
    features.write_repo(tmp_path, generated)
    assert (tmp_path / "feature_store.yaml").read_text() == "mine"
    assert (tmp_path / "features.py").read_text() == (GOLDEN / "features.py").read_text()


def test_names_cannot_run():
    name = '"""\n' + "x\\'\N{GRINNING FACE}\u2028\"; import os #"
    view = View(f"2 {name}_std", (pa.field(name, pa.float32()),))
    odd = Features(f"s3://b/{name}", 1, pa.field(name, pa.int64()), name, (view,))
    tree = ast.parse(features.definitions("features.py", odd))
    assert len(tree.body) == 8
    assert name in {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    with pytest.raises(UserError, match="two modalities have names that differ only"):
        features.definitions("features.py", odd._replace(views=(View("a b_std", ()), View("a_b_std", ()))))


def test_without_feast_one_message_says_how_to_get_it(small_cohort, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(features.SETTING, str(tmp_path / "feast"))
    code, text = run(
        monkeypatch, capsys, "features", "apply", "--model", small_cohort[2], "--output", str(tmp_path), "--repo", str(tmp_path / "repo")
    )
    assert code == 2 and "make features-env" in text and "Traceback" not in text and not (tmp_path / "repo").exists()
    code, text = run(monkeypatch, capsys, "features", "materialize", "--repo", str(tmp_path))
    assert code == 2 and "no feature_store.yaml there" in text


def test_what_feast_says_of_records_is_not_repeated(tmp_path, monkeypatch, capsys):
    program = tmp_path / "feast"
    program.write_text("#!/bin/sh\necho 'Traceback ...\npackage.SomeError: s000123 has 7.5' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv(features.SETTING, str(program))
    (tmp_path / "feature_store.yaml").touch()
    code, text = run(monkeypatch, capsys, "features", "materialize", "--repo", str(tmp_path), "--end", "2024-01-01")
    assert code == 2 and "`feast materialize 1900-01-01T00:00:00 2024-01-01T00:00:00` failed (package.SomeError)" in " ".join(text.split())
    assert "s000123" not in text and "Traceback" not in text


@pytest.fixture(scope="module")
def feast():
    """The path of Feast's program; its environment is made where there is none."""
    if features.SETTING not in os.environ:
        subprocess.run(["make", "--silent", "features-env"], cwd=ROOT, check=True)
    return os.environ.get(features.SETTING, str(ROOT / features.PROGRAM))


def microseconds(rng: np.random.Generator, n: int) -> np.ndarray:
    """Moments between FIRST and LAST, since 1970."""
    return rng.integers(int(FIRST.timestamp()), int(LAST.timestamp()), n) * 1_000_000 + rng.integers(0, 1_000_000, n)


def visits(rows: int, seed: int, first: int) -> pa.Table:
    """Records of subjects `first` to `first + rows`, each at a moment of its own; every fifth an hour or two after END."""
    moments = microseconds(np.random.default_rng(seed), rows)
    moments[::5] = int((END.timestamp() + 3600) * 1e6) + moments[::5] % int(3600e6)
    return linear_cohort(rows, seed, first).append_column("index_date", pa.array(moments).cast(pa.timestamp("us")))


def impute(model, bucket: str, shards: str, cohort: dict[str, pa.Table]) -> pa.Table:
    """Publishes enriched records of a cohort of small shards and returns them. Nothing is committed."""
    for name, rows in cohort.items():
        publish_table(f"{bucket}/{shards}", f"{name}.parquet", rows)
    listed = list_shards(f"{bucket}/{shards}")
    done = [impute_shard(model, f"{bucket}/{shards}", s, f"{bucket}/enriched", SETTINGS) for s in listed]
    return pa.concat_tables(fetch_table(f"{bucket}/enriched", status["output"]) for status in done)


def commit(model, bucket: str) -> None:
    jobs.commit_table(planning.listed_for(f"{bucket}/shards", model.schema), model.url, f"{bucket}/enriched", SETTINGS)


def questions(seed: int, n: int = 200) -> pa.Table:
    """Subjects and moments to ask for: some before the subject's first record, some of nobody."""
    rng = np.random.default_rng(seed)
    subjects = [f"s{i:06d}" for i in rng.integers(0, 140, n)]
    moments = pa.array(microseconds(rng, n)).cast(pa.timestamp("us", "UTC"))
    return pa.table({"subject_id": subjects, "event_timestamp": moments, "label": range(n)})


def known(enriched: pa.Table) -> pa.Table:
    """Complete records by DuckDB: subject, `known_at` (microseconds) and features; the input where nothing was missing."""
    values = [f"coalesce({c}__imputed, {c}) AS {c}__imputed" for c in COLUMNS]
    deviations = [f"coalesce({c}__std, {'[0.0::FLOAT FOR _ IN ' + c + ']' if c in LISTS else 0}) AS {c}__std" for c in COLUMNS]
    query = f"SELECT subject_id, epoch_us(index_date) AS known_at, z0, {', '.join(values + deviations)} FROM enriched"
    return duckdb.sql(query).to_arrow_table()


def as_of(asked: pa.Table, records: pa.Table) -> list[dict]:
    """The newest record of the subject at or before each moment, nulls where there is none: DuckDB's ASOF join."""
    asked = asked.set_column(1, "moment", asked["event_timestamp"].cast(pa.int64()))
    query = """
        SELECT asked.subject_id, label, records.* EXCLUDE (subject_id, known_at)
        FROM asked ASOF LEFT JOIN records ON asked.subject_id = records.subject_id AND asked.moment >= records.known_at ORDER BY label
    """
    return duckdb.sql(query).to_arrow_table().to_pylist()


@pytest.mark.services
def test_feast_answers_as_of_each_moment(feast, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(features.SETTING, feast)
    monkeypatch.setenv("TZ", "America/New_York")  # of Feast's processes: moments are UTC all the same
    cohort = {name: visits(60, seed, 30 * seed) for seed, name in enumerate("abc")}
    (tmp_path / "cohort.toml").write_text('timestamp = "index_date"\n' + SPEC)
    impute_first = {**cohort, "b": visits(50, 7, 30)}
    for name, rows in impute_first.items():
        publish_table(f"{bucket}/shards", f"{name}.parquet", rows)
    home = untrained_model(f"{bucket}/shards", f"{bucket}/model", tmp_path / "cohort.toml")
    model, repo = registry.load(home), str(tmp_path / "repo")
    places = ["--model", f"{bucket}/model", "--output", f"{bucket}/enriched", "--repo", repo]

    # A version of the table, another one after it, and what nobody committed.
    impute(model, bucket, "shards", impute_first)
    commit(model, bucket)
    code, text = run(monkeypatch, capsys, "features", "apply", *places)
    assert code == 0 and "table version 0: 3 of 3 objects exported now, 170 records" in text and "column index_date" in text
    enriched = impute(model, bucket, "shards", cohort)
    commit(model, bucket)
    impute(model, bucket, "elsewhere", {"dead": visits(120, 8, 0)})
    code, text = run(monkeypatch, capsys, "features", "apply", *places)
    assert code == 0 and "table version 1: 3 of 3 objects exported now, 180 records" in text
    code, text = run(monkeypatch, capsys, "features", "materialize", "--repo", repo, "--end", f"{END:%Y-%m-%d}")
    assert code == 0 and "materialised up to 2023-01-01 00:00:00 UTC" in text

    asked, records = questions(1), known(enriched)
    historical, online = ask(feast, repo, asked, tmp_path)
    expected = as_of(asked, records)
    assert historical.drop_columns(["event_timestamp"]).select(list(expected[0])).to_pylist() == expected
    assert historical["event_timestamp"].cast(pa.int64()).equals(asked["event_timestamp"].cast(pa.int64()))
    found = sum(r["z0"] is not None for r in expected)
    assert 50 < found < len(expected) - 50  # both kinds of rows were asked for

    subjects = sorted(set(asked["subject_id"].to_pylist()))
    end = pa.array([END] * len(subjects), pa.timestamp("us", "UTC"))
    newest = as_of(pa.table({"subject_id": subjects, "event_timestamp": end, "label": range(len(subjects))}), records)
    assert online.append_column("label", [range(len(subjects))]).select(list(newest[0])).to_pylist() == newest


def ask(feast: str, repo: str, asked: pa.Table, folder: Path) -> tuple[pa.Table, pa.Table]:
    """What Feast's historical features, in the order of their labels, and its online ones are, by a client in Feast's environment."""
    pq.write_table(asked, folder / "asked.parquet")
    python = str(Path(feast).with_name("python"))
    client = [python, str(Path(__file__).with_name("feast_client.py")), repo, str(folder / "asked.parquet"), str(folder)]
    done = subprocess.run(client, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return pq.read_table(folder / "historical.parquet").sort_by("label"), pq.read_table(folder / "online.parquet")
