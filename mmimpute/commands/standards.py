"""`mmimpute ingest` and `mmimpute export`: clinical data standards in and out."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmimpute.commands.finish import finish
from mmimpute.commands.options import TABLE_HELP, Address, ModelUrl, written
from mmimpute.console import console, watch
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings

ingest_app = typer.Typer(no_args_is_help=True, help="Clinical data standards into shards of records.")
export_app = typer.Typer(no_args_is_help=True, help="Imputed values out into clinical data standards.")
Dataset = Annotated[str, typer.Option(help="URL to write the MEDS dataset to; empty")]
Memory = Annotated[str, typer.Option(help="most that DuckDB holds, such as 4GB; default: four fifths of the machine's")]


@ingest_app.command()
def meds(
    url: Annotated[str, typer.Argument(help="URL of the MEDS dataset: the folder of data/ and metadata/")],
    spec: Annotated[Path, typer.Option(help="the feature spec, a TOML file")],
    output: Annotated[str, typer.Option(help="URL to write shards/ and cohort.toml to")],
    write: Annotated[Path | None, written("also write the cohort spec to this file")] = None,
    address: Address = None,
) -> None:
    """Turn MEDS event shards into shards of records, and write the cohort spec that `mmimpute fit` takes.

    The first call settles which features there are, by the training subjects; a later one does what is new, with the same features.
    Where the dataset has splits, each has its folder under shards/.

    Example: mmimpute ingest meds s3://bucket/meds/ --spec features.toml --output s3://bucket/cohort/ --write cohort.toml
    """
    from mmimpute.ingesting import SHARDS, ingest_meds
    from mmimpute.standards.features import read_features

    done = ingest_meds(url, read_features(spec), output, ClusterSettings(address=address), watch("ingest"))
    if write:
        write.write_text(done["spec"], encoding="utf-8")
    console.print(
        f"{done['events']:,} events of {done['rows']:,} subjects ({done['undated']:,} without an index time left out; "
        f"{done['done_before']} of {done['shards']} shards were done before): {escape(output.rstrip('/'))}/{SHARDS}"
    )
    for name, features in done["features"].items():
        console.print(f"  {escape(name)}: {features:,} features")
    finish(done["set_aside"])


@ingest_app.command()
def csv(
    url: Annotated[str, typer.Argument(help="URL of the files: *.csv, *.csv.gz, each with one header line")],
    output: Annotated[str, typer.Option(help="URL to write the shards to")],
) -> None:
    """Turn CSV files into shards of records, one shard per file, for `mmimpute describe`.

    Types are settled on all files; empty, NA, null and nan mean missing; the subject id stays text. A second call writes them anew.

    Example: mmimpute ingest csv s3://bucket/csv/ --output s3://bucket/cohort/
    """
    from mmimpute.standards.csv import to_shards

    done = to_shards(url, output, watch("ingest"))
    console.print(f"{done['rows']:,} records in {done['shards']:,} shards: {escape(output)}")
    finish(done["set_aside"])


@ingest_app.command()
def omop(
    url: Annotated[
        str,
        typer.Argument(
            help="URL of a folder of Parquet (<table>.parquet, <table>/*.parquet), a DuckDB file, postgresql://..., sqlite:///path"
        ),
    ],
    output: Dataset,
    memory: Memory = "",
) -> None:
    """Turn OMOP CDM tables into a MEDS dataset, for `mmimpute ingest meds`.

    Codes are <vocabulary>//<code> of the table concept, by the standard concept and, where it is another, the source concept.

    Example: mmimpute ingest omop s3://bucket/omop/ --output s3://bucket/meds/
    """
    _check_duckdb()
    from mmimpute.standards import omop

    _tell(omop.to_meds(url, output, memory), "tables", "rows", output)


@ingest_app.command()
def fhir(
    url: Annotated[str, typer.Argument(help="URL of a FHIR bulk export: Patient.ndjson, Observation.000.ndjson.gz, ...")],
    output: Dataset,
    key: Annotated[Path, typer.Option(help="file of the secret by which ids become numbers; made where there is none: keep it, privately")],
    memory: Memory = "",
) -> None:
    """Turn a FHIR bulk export (R4, R5) into a MEDS dataset, for `mmimpute ingest meds`.

    Codes are <code system>//<code>; each coding is an event. Subject ids become numbers, the same ones whenever the key is the same.

    Example: mmimpute ingest fhir s3://bucket/fhir/ --output s3://bucket/meds/ --key subjects.key
    """
    _check_duckdb()
    from mmimpute.standards import fhir

    _tell(fhir.to_meds(url, output, fhir.subject_key(key), memory), "resources", "resources", output)


def _check_duckdb() -> None:
    if find_spec("duckdb") is None:
        raise UserError("OMOP and FHIR need DuckDB: pip install 'mmimpute[standards]'")


def _tell(done: dict, parts: str, what: str, output: str) -> None:
    for name, (read, events) in done[parts].items():
        console.print(f"  {name}: {events:,} events of {read:,} {what}")
    console.print(f"{done['events']:,} events of {done['subjects']:,} subjects in {done['shards']} shards: {escape(output)}")
    finish(done["set_aside"])


@export_app.command("meds")
def export_meds(
    model: ModelUrl,
    output: Annotated[str, typer.Option(help=TABLE_HELP)],
    to: Dataset,
) -> None:
    """Write what was imputed, and nothing else, as a MEDS dataset: codes MMIMPUTE//<modality>//<feature>, at the index time.

    Example: mmimpute export meds --model s3://bucket/model/ --output s3://bucket/enriched/ --to s3://bucket/imputed-meds/
    """
    from mmimpute import registry
    from mmimpute.standards.export import export

    done = export(registry.describe(model).cohort, output, to)
    console.print(
        f"table version {done['version']}: {done['events']:,} imputed values of {done['rows'] - done['undated']:,} records, "
        f"{done['codes']:,} codes ({done['undated']:,} records without an index time left out): {escape(to)}"
    )
