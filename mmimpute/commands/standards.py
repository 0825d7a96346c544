"""`mmimpute ingest` and `mmimpute export`: clinical data standards in and out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmimpute.commands.finish import finish
from mmimpute.console import console, watch
from mmimpute.spec import ClusterSettings

ingest_app = typer.Typer(no_args_is_help=True, help="Clinical data standards into shards of records.")
Address = Annotated[str | None, typer.Option(help="address of a Ray cluster; default: a local one")]


@ingest_app.command()
def meds(
    url: Annotated[str, typer.Argument(help="URL of the MEDS dataset: the folder of data/ and metadata/")],
    spec: Annotated[Path, typer.Option(help="the feature spec, a TOML file")],
    output: Annotated[str, typer.Option(help="URL to write shards/ and cohort.toml to")],
    write: Annotated[Path | None, typer.Option(help="also write the cohort spec to this file")] = None,
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
