"""Commands and tables of what a model is asked besides imputation."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mmimpute.commands.finish import finish
from mmimpute.commands.options import Address, ModelUrl
from mmimpute.console import console, new_table
from mmimpute.report.tasks import SAMPLES, condition
from mmimpute.spec import ClusterSettings

tasks_app = typer.Typer()


@tasks_app.command()
def retrieve(
    model: ModelUrl,
    shards: Annotated[str, typer.Option(help="URL of the cohort's Parquet shards: s3://bucket/prefix or a folder")],
    query: Annotated[str, typer.Option(help="modality that is known")],
    among: Annotated[str, typer.Option(help="modality that is looked for")],
    output: Annotated[str, typer.Option(help="URL to write the table to; it holds subject ids")],
    k: Annotated[int, typer.Option(min=1, help="how many are found for each")] = 10,
    address: Address = None,
) -> None:
    """Find for one modality of everyone who holds it the likeliest of all that hold another: cross-modal retrieval through z0.

    Writes a Parquet table: query and found (subject ids), rank, score (log-likelihood ratio, in nats). What the two modalities have in
    common is learnt from half of the people who hold both; the recall told is that of the others, whom the model may have seen.

    Example: mmimpute retrieve --model s3://bucket/model/ --shards s3://bucket/cohort/ --query rna --among meth --output s3://bucket/f/
    """
    from mmimpute import jobs

    done = jobs.retrieve_table(model, shards, query, among, k, output, ClusterSettings(address=address))
    told = done["recall"]
    shares = ", ".join(f"{share:.1%} at {depth} (by chance {told['chance'][depth]:.1%})" for depth, share in told["recall"].items())
    console.print(
        f"{escape(query)} of {done['queries']:,} people looked for among {escape(among)} of {done['among']:,}: {escape(done['table'])}\n"
        f"recall of {told['rows']:,} people who hold both: {shares}; median rank {told['median_rank']:,.0f}"
    )
    finish(done["set_aside"])


def task_tables(tasks: dict) -> list[Table]:
    """What `tasks.asking.ask` found."""
    tables = {"coherence": _coherence, "quality": _quality, "likelihood": _likelihood, "probe": _probe, "retrieval": _retrieval}
    return [tables[name](found) for name, found in tasks.items()]


def _coherence(found: dict) -> Table:
    columns = ("modality", "records", "commonest class", "real right", "drawn right", "AUROC real", "drawn")
    table = new_table("Coherence: classifiers of the label on real values and on draws given the other modalities", *columns)
    for name, c in found["conditional"].items():
        shares = [c[key] for key in ("commonest", "accuracy", "coherence", "auroc", "auroc_drawn")]
        table.add_row(escape(name), f"{c['rows']:,}", *map(_decimal, shares))
    if joint := found["joint"]:
        shares = [f"{joint[key]:.1%}" for key in ("synthetic", "real", "chance")]
        table.caption = "joint: the modalities' classifiers agree on {} of synthetic records, {} of real ones; {} if independent".format(
            *shares
        )
    return table


def _quality(found: dict) -> Table:
    columns = ("modality", "records", "samples", "Frechet distance", "density", "coverage")
    table = new_table("Sample quality, in the features of the classifiers", *columns)
    for name, entry in found.items():
        for which, label in SAMPLES.items():
            if entry[which]:
                table.add_row(
                    escape(name), f"{entry['rows']:,}", label, *(_decimal(entry[which][m]) for m in ("frechet", "density", "coverage"))
                )
    return table


def _likelihood(found: dict) -> Table:
    table = new_table(f"Log-likelihood, nats: at least this ({found['samples']:,} samples)", "modality", "records", "a record", "a value")
    rows = {"everything observed": found} | {f"{escape(n)}, given the rest": e for n, e in found["conditional"].items()}
    for name, entry in rows.items():
        cells = [f"{entry[k]['mean']:.3f} ± {1.96 * entry[k]['std_error']:.3f}" for k in ("nats", "per_value")]
        table.add_row(name, f"{entry['rows']:,}", *cells)
    table.caption = f"by one sample {found['elbo']['mean']:.3f}; the {found['samples']:,} are worth {found['effective']:.0f}"
    return table


def _probe(found: list[dict]) -> Table:
    columns = ("modality", "records", "AUROC of z0", "of raw values", "difference", "accuracy of z0", "of raw values")
    table = new_table("Label from z0: a linear probe, beside one on mean-filled values; 95% intervals", *columns)
    for entry in found:
        cells = [_interval(entry[name]["auroc"]) for name in ("z0", "raw", "difference")]
        table.add_row(escape(condition(entry)), f"{entry['rows']:,}", *cells, *(_decimal(entry[n]["accuracy"][0]) for n in ("z0", "raw")))
    return table


def _retrieval(found: list[dict]) -> Table:
    columns = ("modality", "found", "records", "recall@1", "@5", "@10", "@10 by chance", "median rank", "of")
    table = new_table("Retrieval: someone's other modality among all people's, through z0", *columns)
    for entry in sorted(found, key=lambda e: -e["recall"]["10"] / e["chance"]["10"]):
        shares = [f"{v:.1%}" for v in (*entry["recall"].values(), entry["chance"]["10"])]
        sizes = [f"{entry['median_rank']:,.0f}", f"{entry['size']:,.0f}"]
        table.add_row(escape(entry["query"]), escape(entry["among"]), f"{entry['rows']:,}", *shares, *sizes)
    return table


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(found: list[float] | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"
