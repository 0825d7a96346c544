"""The command line: help that teaches, and mistakes told in one message with the right exit code."""

import os
import subprocess
import sys

import pytest
import typer

from mmimpute import cli, registry
from mmimpute.data import storage
from mmimpute.data.shards import publish_table
from tests.conftest import linear_cohort, write_cohort


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["mmimpute", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code or 0, "".join(capsys.readouterr())


def commands(command=None, path=()) -> list[tuple[str, ...]]:
    command = command or typer.main.get_command(cli.app)
    inner = getattr(command, "commands", {})
    own = [path] if path and (not inner or command.invoke_without_command) else []
    return own + [p for name, c in inner.items() for p in commands(c, (*path, name))]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_help_has_an_example(path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, text = run(monkeypatch, capsys, *path, "--help")
    assert code == 0
    assert f"mmimpute {' '.join(path)}" in text.split("Example")[1]


def test_all_commands_are_there():
    found = {" ".join(p) for p in commands()}
    assert {
        "describe",
        "fit",
        "impute",
        "generate",
        "generate-cohort",
        "evaluate",
        "drift",
        "evaluate downstream",
        "retrieve",
        "alerts",
        "vacuum",
        "verify",
        "run",
        "retrain",
        "finetune",
        "classify",
        "models",
        "rollback",
        "demo",
        "store start",
        "store stop",
        "store status",
    } <= found


@pytest.fixture
def folder(tmp_path, spec_file):
    write_cohort(str(tmp_path / "shards"), rows=60, shards=2)
    (tmp_path / "groups.toml").write_text('subgroups = ["dx__site", "labs"]\n' + spec_file.read_text())
    return tmp_path


MISTAKES = {
    "no spec": (["fit", "--spec", "{0}/none.toml", "--shards", "{0}/shards", "--model", "{0}/m"], "none.toml: no such file"),
    "no shards": (["fit", "--spec", "{0}/cohort.toml", "--shards", "{0}/nothing", "--model", "{0}/m"], "there is no such folder"),
    "no model": (["impute", "--model", "{0}/m", "--shards", "{0}/shards", "--output", "{0}/o"], "no model there"),
    "no such interval": (
        ["impute", "--model", "{0}/m", "--shards", "{0}/shards", "--output", "{0}/o", "--interval", "0.7"],
        "impute: interval: Input should be 0, 0.5, 0.8, 0.9 or 0.95",
    ),
    "no bucket": (["describe", "s3://never-made/x"], "there is no such bucket"),
    "no run file": (["run", "{0}/none.toml"], "none.toml: no such file"),
    "nothing to retrain": (["retrain", "{0}/none.toml"], "none.toml: no such file"),
    "nothing to roll back": (["rollback", "--model", "{0}/m"], "no former champion to return to"),
    "no models": (["models", "--model", "{0}/m"], "no model there"),
    "no such subgroup": (["fit", "--spec", "{0}/groups.toml", "--shards", "{0}/shards", "--model", "{0}/m"], "subgroups names 'labs'"),
    "wrong scheme": (["describe", "gs://bucket/x"], "expected s3://bucket/prefix"),
    "no option": (["fit", "--spec", "{0}/cohort.toml"], "Missing option"),
    "another cohort": (["generate-cohort", "{0}/shards", "--rows", "10"], "holds something else than this cohort"),
    "no bucket to write to": (["generate-cohort", "s3://never-made/x", "--rows", "10"], "there is no such bucket"),
    "no records": (["generate-cohort", "{0}/o", "--rows", "0"], "greater than or equal to 1"),
    "no table to clean": (["vacuum", "{0}/shards"], "no table there"),
    "actors": (["impute", "--model", "{0}/m", "--shards", "{0}/shards", "--output", "{0}/o", "--actors", "-1"], "impute: actors: Input"),
    "GPUs": (
        ["classify", "--head", "{0}/h", "--shards", "{0}/shards", "--output", "{0}/o", "--gpus-per-actor", "-1"],
        "classify: gpus_per_actor: Input should be greater than or equal to 0",
    ),
    "no epochs": (
        ["fit", "--spec", "{0}/cohort.toml", "--shards", "{0}/shards", "--model", "{0}/m", "--epochs", "0"],
        "fit: epochs: Input should be greater than or equal to 1",
    ),
    "no folder for the spec": (["describe", "{0}/nothing", "--write", "{0}/none/cohort.toml"], "there is no folder"),
    "a folder for the spec": (["describe", "{0}/nothing", "--write", "{0}"], "Invalid value for '--write'"),
    "no folder for the numbers": (["evaluate", "--model", "{0}/m", "--shards", "{0}/s", "--json", "{0}/none/e.json"], "there is no folder"),
    "no folder for the page": (["evaluate", "--model", "{0}/m", "--shards", "{0}/s", "--report", "{0}/none/e.html"], "there is no folder"),
    "no folder for the plot": (["finetune", "{0}/run.toml", "--report", "{0}/none/h.html"], "there is no folder"),
    "no folder for what was ingested": (
        ["ingest", "meds", "{0}/m", "--spec", "{0}/f.toml", "--output", "{0}/o", "--write", "{0}/none/cohort.toml"],
        "there is no folder",
    ),
    "no table": (["runs", "--output", "/etc/passwd"], "no table that can be read"),
    "no number": (["generate", "--model", "{0}/m", "--output", "{0}/o", "--n", "0"], "greater than or equal to 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_exit_2_without_a_traceback(case, folder, endpoint, monkeypatch, capsys):
    arguments, message = MISTAKES[case]
    code, text = run(monkeypatch, capsys, *(a.format(folder) for a in arguments))
    assert code == 2
    assert message in " ".join(text.split()) and "Traceback" not in text


def test_a_model_that_does_not_fit_exits_2(small_cohort, folder, monkeypatch, capsys):
    publish_table(str(folder / "other"), "a.parquet", linear_cohort(10).drop_columns(["rna"]))
    arguments = ["impute", "--model", small_cohort[2], "--shards", str(folder / "other"), "--output", str(folder / "o")]
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "no shard fits the cohort" in text


def test_drift_needs_what_fit_keeps(small_cohort, monkeypatch, capsys):
    shards, _, home = small_cohort
    code, text = run(monkeypatch, capsys, "drift", "--model", home, "--shards", shards)
    assert code == 2 and "no reference.json to compare with" in text and "Traceback" not in text


def test_a_rollback_and_what_the_list_of_models_says_of_it(small_cohort, folder, monkeypatch, capsys):
    home = str(folder / "home")
    first, second = (f"{digit}" * 32 for digit in "ab")
    for name, at in ((first, "2026-11-01"), (second, "2026-11-08")):
        storage.write(home, f"{name}/model.json", b"{}")
        registry.write_record(f"{home}/{name}", "fitted", {"at": at, "rows": 9254})
        registry.promote(home, name)
    registry.write_record(f"{home}/{second}", "gate", {"reason": "promoted: better by 0.0120 [of skill]"})
    code, text = run(monkeypatch, capsys, "rollback", "--model", home)
    assert code == 0 and text == f"champion again: model {first[:12]}\n" and registry.champion(home) == first
    code, text = run(monkeypatch, capsys, "models", "--model", home)
    newest, oldest = (" ".join(line.split()) for line in text.splitlines() if "9,254" in line)
    assert code == 0 and "rolled back" in newest and "better by 0.0120 [of skill]" in newest and "champion" in oldest


def test_endpoint_that_is_not_there(endpoint, monkeypatch, capsys):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    code, text = run(monkeypatch, capsys, "describe", "s3://bucket/x")
    assert code == 2 and "check endpoint and network" in text


@pytest.mark.services
def test_bad_shards_exit_3_and_good_ones_are_done(small_cohort, tmp_path, monkeypatch, capsys):
    shards, _, model = small_cohort
    for name in ("part-000.parquet", "part-001.parquet"):
        storage.write(str(tmp_path / "shards"), name, storage.read(shards, name))
    storage.write(str(tmp_path / "shards"), "x.parquet", b"PAR1 but no more")
    arguments = ["impute", "--model", model, "--shards", str(tmp_path / "shards"), "--output", str(tmp_path / "o"), "--actors", "1"]
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 3 and "x.parquet" in text and "300 records imputed" in text
    assert len(list((tmp_path / "o").glob("part-*.parquet"))) == 2


def test_importing_the_command_line_is_light():
    code = "import sys, mmimpute.cli; print([m for m in ('torch', 'ray', 'prefect', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["mmimpute.retraining", "mmimpute.estimator"])
def test_threads_are_told_to_wait_passively_before_torch_is_loaded(module):
    """Beside one busy process spinning threads made a prediction take 36 times as long."""
    code = f"""
import os, sys
class Told:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Told)
import {module}"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split() == ["PASSIVE"]
