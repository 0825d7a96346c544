"""`mmimpute features`: the enriched table as a feature store."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmimpute.console import console

features_app = typer.Typer(no_args_is_help=True, help="The enriched table as a Feast feature store.")
Repo = Annotated[Path, typer.Option(help="folder of the Feast repo")]


@features_app.command()
def apply(
    model: Annotated[str, typer.Option(help="URL of the model, as given to `mmimpute impute`")],
    output: Annotated[str, typer.Option(help="URL of the table, as given to `mmimpute impute`")],
    repo: Repo,
) -> None:
    """Make the table's newest version what the feature store reads: export it, write the Feast repo, apply that.

    Example: mmimpute features apply --model s3://bucket/model/ --output s3://bucket/enriched/ --repo features/
    """
    from mmimpute import features

    done = features.apply(model, output, repo)
    event_time = f"column {done['timestamp']}" if done["timestamp"] else "when a record came into the table (the cohort has no timestamp)"
    console.print(
        f"table version {done['version']}: {done['written']:,} of {done['objects']:,} objects exported now, {done['rows']:,} records"
        + (f", {done['undated']:,} of them without an event time and left out" if done["undated"] else "")
    )
    console.print(f"event time: {escape(event_time)}\nfeature views: {escape(', '.join(done['views']))}\nFeast repo: {escape(str(repo))}")


@features_app.command()
def materialize(repo: Repo, end: Annotated[datetime | None, typer.Option(help="UTC; default: now")] = None) -> None:
    """Put the newest values of every subject into the online store.

    Example: mmimpute features materialize --repo features/
    """
    from mmimpute import features

    end = end or datetime.now(UTC).replace(tzinfo=None)
    features.materialize(repo, end)
    console.print(f"materialised up to {end:%Y-%m-%d %H:%M:%S} UTC: {escape(str(repo))}")
