"""`mmimpute finetune` and `mmimpute classify`: classes from a model's z0."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmimpute.commands.finish import finish
from mmimpute.commands.options import TABLE_HELP, Address, written
from mmimpute.console import console, new_table, watch
from mmimpute.errors import UserError
from mmimpute.spec import ClusterSettings, ImputeSettings, read_config, validated

classify_app = typer.Typer()


@classify_app.command()
def finetune(
    config: Annotated[Path, typer.Argument(help="the run's configuration, a TOML file with a table \\[finetune]")],
    report: Annotated[Path | None, written("write an HTML page with a plot to this file")] = None,
) -> None:
    """Fit a head for scarce labels on the champion's z0, from the shards' labelled records, and print its URL.

    The table: target = \\["outcome__pam50"], and optionally full = true, class_weight = "balanced", epochs, lr, most, seed.
    The head belongs to the model that is champion now. AUROC is out of fold: by members that have not seen the people; also of linear
    heads that learnt from fewer labels, to tell whether more would help.

    Example: mmimpute finetune run.toml
    """
    from mmimpute import jobs

    given = read_config(config)
    if given.finetune is None:
        raise UserError(f"{config}: no table [finetune]; it names the labels, such as target = ['outcome__died']")
    done = jobs.finetune_head(given.model, given.shards, given.finetune, given.cluster)
    found = new_table(
        f"{done['rows']:,} labelled records", "target", "people", "classes", "AUROC, out of fold", "of a linear head by fewer labels"
    )
    for t in done["targets"]:
        auroc = "-" if t["auroc"] is None else f"{t['auroc']:.3f}"
        fewer = ", ".join(f"{people:,}: {score:.3f}" for people, score in t["curve"][:-1])
        found.add_row(escape(t["column"]), f"{t['people']:,}", escape(", ".join(t["levels"])), auroc, fewer)
    console.print(found)
    console.print(f"head: {escape(done['head'])}")
    if report:
        from mmimpute.report import render  # matplotlib is for those who want pages

        title = f"Head of model {done['model'].rsplit('/', 1)[-1][:12]}"
        report.write_text(render({"title": title, "heads": done["targets"]}), encoding="utf-8")
    finish(done["set_aside"])


@classify_app.command()
def classify(
    head: Annotated[str, typer.Option(help="URL of the head, as `mmimpute finetune` prints it")],
    shards: Annotated[str, typer.Option(help="URL of the cohort's Parquet shards: s3://bucket/prefix or a folder")],
    output: Annotated[str, typer.Option(help=TABLE_HELP)],
    interval: Annotated[float, typer.Option(help="as of `mmimpute impute`")] = 0,
    draws: Annotated[int, typer.Option(help="as of `mmimpute impute`")] = 0,
    latent: Annotated[bool, typer.Option(help="as of `mmimpute impute`")] = False,
    seed: int = 0,
    prune: Annotated[bool, typer.Option("--prune", help="as of `mmimpute impute`")] = False,
    actors: Annotated[int, typer.Option(help="as of `mmimpute impute`")] = 0,
    gpus_per_actor: float = 0,
    address: Address = None,
) -> None:
    """Write enriched shards with the head's probabilities beside what is imputed, and commit them to the Delta table.

    X__probability of a target X: of 1 where its classes are 0 and 1, else a list over the classes in the order of the head's head.json.

    Example: mmimpute classify --head s3://bucket/model/heads/<digest> --shards s3://bucket/cohort/ --output s3://bucket/enriched/
    """
    from mmimpute import jobs

    settings = validated(ImputeSettings, {"interval": interval, "draws": draws, "latent": latent, "seed": seed}, "classify")
    cluster = validated(ClusterSettings, {"address": address, "actors": actors, "gpus_per_actor": gpus_per_actor}, "classify")
    done = jobs.classify_cohort(head, shards, output, settings, cluster, watch("classify"), prune)
    console.print(
        f"{done['rows']:,} records classified in {done['seconds']['all']:.0f} s "
        f"({done['done_before']} of {done['shards']} shards were done before); "
        f"table version {done['committed']['version']}: {escape(output)}"
    )
    finish(done["set_aside"])
