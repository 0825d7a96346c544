"""A cohort with cheap and dear labels on a real Ray and object store: contrastive fit, head, probabilities in the table."""

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from mmimpute import cli, heads, jobs, planning, registry, retraining
from mmimpute.cluster import runtime
from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings, FitSettings, ImputeSettings, read_spec
from tests.conftest import SPEC, linear_cohort

pytestmark = pytest.mark.services
CLUSTER = ClusterSettings(cpus=4, actors=1)
CONTRASTIVE = '[contrastive]\non = ["z0", "labs"]\n[contrastive.labels]\nscore = {soft = true}\nward = 0.5\n'


def cohort() -> pa.Table:
    """What drives labs tells of a score and, seen more dimly, of a ward; a third of the people have a dear label too."""
    table, rng = linear_cohort(400), np.random.default_rng(1)
    first = np.array([(row or [0.0])[0] or 0.0 for row in table.column("labs").to_pylist()])
    table = table.append_column("score", pa.array(first + rng.normal(size=400)))
    table = table.append_column("ward", pa.array(np.array(["A", "B"])[(first + rng.normal(size=400) > 0).astype(int)].astype(object)))
    died = pa.array((first > 0).astype(int), mask=np.arange(400) % 3 > 0)
    return table.set_column(table.column_names.index("outcome__died"), "outcome__died", died)


def test_from_cheap_labels_to_probabilities(bucket, tmp_path, capsys, monkeypatch):
    shards, home, output = (f"{bucket}/{name}" for name in ("shards", "model", "out"))
    table = cohort()
    for at in range(2):
        publish_table(shards, f"part-{at}.parquet", table.slice(150 * at, 150))
    publish_table(shards, "part-2.parquet", table.slice(300).drop_columns(["ward"]))  # labels need not be everywhere
    (tmp_path / "cohort.toml").write_text(SPEC + CONTRASTIVE)
    places = f'spec = "cohort.toml"\nshards = "{shards}"\nmodel = "{home}"\noutput = "{output}"\n'
    (tmp_path / "run.toml").write_text(places + '[finetune]\ntarget = ["outcome__died"]\nfull = true\nepochs = 2\n[cluster]\ncpus = 4\n')
    spec, epochs = read_spec(tmp_path / "cohort.toml"), []
    with runtime.cluster(CLUSTER):
        found = planning.survey(shards, spec)
        fit = FitSettings(epochs=2, batch_size=64, workers=2)
        fitted = retraining.renew(found, spec, home, fit, None, CLUSTER, epochs.append)
        monkeypatch.setattr("sys.argv", ["mmimpute", "finetune", str(tmp_path / "run.toml")])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        printed = "".join(capsys.readouterr().out.split("head: ")[1].split())
        done = jobs.classify_cohort(printed, shards, output, ImputeSettings(), CLUSTER)
        again = jobs.classify_cohort(printed, shards, output, ImputeSettings(), CLUSTER)
    assert all(e["tune_contrast"] > 0 for e in epochs if "epoch" in e)
    model = registry.load(home)
    assert [label.column for label in model.schema.contrastive.labels] == ["score", "ward"]
    assert model.schema.contrastive.labels[1].levels == ("A", "B") and "score" not in model.schema.columns
    assert not any("projections" in name for name in model.module.state_dict())
    assert heads.describe(printed).targets[0].people == 134
    state = pa.table(DeltaTable(output, storage_options=storage.delta_options(output)).to_pyarrow_table())
    died = state.column("outcome__died__probability").to_numpy()
    assert len(died) == done["rows"] == 400 and ((died > 0) & (died < 1)).all()
    assert again["done_before"] == 3 and again["committed"]["added"] == 0
    with pytest.raises(UserError, match="a head of model"):
        monkeypatch.setattr(heads, "digest_of", lambda place: "f" * 32)
        jobs.impute_table(found, fitted["model"], output, ImputeSettings(head=printed), CLUSTER)
