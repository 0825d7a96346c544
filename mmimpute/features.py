"""A Feast repo for the enriched table: generated from the model's schema, applied and materialised by the `feast` program.

Feast needs an older pandas than the rest, so it stands in an environment of its own and is executed, never imported.

    <repo>/feature_store.yaml    where the registry and the online store are; written once
    <repo>/features.py           entity, source, feature views; written anew by every `apply`
    <repo>/parquet_store.py      how Feast reads the export (see `exporting`) in S3; the same
"""

import json
import os
import re
import shutil
import subprocess
from datetime import datetime
from functools import partial
from pathlib import Path

import jinja2
import pyarrow as pa

from mmimpute import registry
from mmimpute.data.schema import is_list
from mmimpute.errors import UserError
from mmimpute.exporting import CREATED, EVENT_TIME, Features, export

SETTING = "MMIMPUTE_FEAST"
PROGRAM = ".venv-features/bin/feast"  # where `make features-env` puts it
TYPES = {pa.float32(): "Float32", pa.float64(): "Float64", pa.int64(): "Int64", pa.string(): "String"}
BEGINNING = "1900-01-01T00:00:00"


def apply(model: str, output: str, repo: Path) -> dict:
    """Exports the table's newest version where that is not done, writes the repo and applies it to the registry.

    Returns {version, timestamp, views (their names), objects, written, rows, undated}, as `exporting.export`.
    Raises UserError where there is no Feast, model or table, or Feast fails.
    """
    feast = program()
    features, counts = export(registry.describe(model).cohort, output)
    write_repo(repo, features)
    _run(feast, repo, "apply")
    return {"version": features.version, "timestamp": features.timestamp, "views": [_identifier(v.name) for v in features.views], **counts}


def materialize(repo: Path, end: datetime) -> None:
    """Puts the newest values up to `end` into the online store. Raises UserError where there is no repo, or Feast fails.

    Always from the beginning: an imputation made today may belong to a record of years ago, which Feast's incremental
    command would pass over, as it does all that is more than a year older than its first call.
    """
    if not (repo / "feature_store.yaml").exists():
        raise UserError(f"{repo}: no feature_store.yaml there; `mmimpute features apply` writes it")
    _run(program(), repo, "materialize", BEGINNING, end.isoformat(timespec="seconds"))


def program() -> str:
    """The path of the `feast` program. Raises UserError that says how to get it."""
    named = os.environ.get(SETTING, PROGRAM)
    found = shutil.which(named)
    if found is None:
        raise UserError(
            f"{named}: no such program. Feast needs an environment of its own: `make features-env` in a checkout, or\n"
            f"python3.11 -m venv .venv-features && .venv-features/bin/pip install 'feast[duckdb]==0.67.0' s3fs\n"
            f"{SETTING} names the program where it is elsewhere."
        )
    return str(Path(found).absolute())


def write_repo(repo: Path, features: Features) -> None:
    repo.mkdir(parents=True, exist_ok=True)
    if not (repo / "feature_store.yaml").exists():
        (repo / "feature_store.yaml").write_text(_templates().get_template("feature_store.yaml").render(), encoding="utf-8")
    for name in ("features.py", "parquet_store.py"):
        (repo / name).write_text(definitions(name, features), encoding="utf-8")


def definitions(name: str, features: Features) -> str:
    """The text of a generated file: the same for the same features. What a model calls its columns is quoted, and cannot run.

    Raises UserError where two views would have one name.
    """
    views = [(_identifier(v.name), [(f.name, _type(f.type)) for f in v.fields]) for v in features.views]
    if len({name for name, _ in views}) < len(views):
        raise UserError("two modalities have names that differ only in other signs than letters and digits; rename one in the spec")
    subject_type = _type(features.subject.type)
    types = {subject_type, *(t for _, fields in views for _, kind in fields for t in re.findall(r"\w+", kind))}
    names = {"subject": features.subject.name, "subject_type": subject_type, "event_time": EVENT_TIME, "created": CREATED}
    values = features._asdict() | names | {"views": views, "types": sorted(types)}
    return _templates().get_template(f"{name}.jinja").render(values)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmimpute", "resources/feast"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = partial(json.dumps, ensure_ascii=False)  # without surrogates Python reads a string as JSON does
    return environment


def _identifier(name: str) -> str:
    """A view's name as Python takes it, and Feast."""
    return re.sub(r"\W|^(?=\d)", "_", name)


def _type(kind: pa.DataType) -> str:
    return f"Array({TYPES[kind.value_type]})" if is_list(kind) else TYPES[kind]


def _run(feast: str, repo: Path, *arguments: str) -> None:
    done = subprocess.run([feast, *arguments], cwd=repo, capture_output=True, text=True, check=False)
    if done.returncode:
        # Only the kind of its error: its messages may hold values.
        kind = re.match(r"[\w.]+(?=:|$)", done.stderr.strip().split("\n")[-1])
        what = f"failed ({kind[0] if kind else f'exit code {done.returncode}'})"
        raise UserError(f"{repo}: `feast {' '.join(arguments)}` {what}; run it in that folder to see its messages")
