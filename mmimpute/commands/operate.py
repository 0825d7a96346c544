"""Commands of those who run it: flows, deployments, models and what ran."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from mmimpute.commands.options import DEFAULT_HOME, TABLE_HELP, ModelUrl
from mmimpute.console import console, new_table, run_tables, runs_table
from mmimpute.spec import read_config

operate_app = typer.Typer()
runs_app = typer.Typer()
operate_app.add_typer(runs_app, name="runs")


@operate_app.command()
def retrain(config: Annotated[Path, typer.Argument(help="the run's configuration, a TOML file, as for `mmimpute run`")]) -> None:
    """Fit a challenger to the shards as they are now, hold it against the champion, and promote it if it is better.

    A Prefect flow: plan, challenge, judge, settle. The table \\[gate] of the file says how much worse than the champion a challenger may
    be anywhere. Nothing is imputed: `mmimpute run` does that, with the champion.

    Example: mmimpute retrain run.toml
    """
    from mmimpute import launch

    model = read_config(config).model  # mistakes are told before Prefect starts
    code = launch.run_flow(config, "retraining")
    if code in (0, 3):
        models(model)
    raise typer.Exit(code)


@operate_app.command()
def models(model: ModelUrl) -> None:
    """List the models that stand at a URL: which is the champion, which were, and why the others were kept.

    Example: mmimpute models --model s3://bucket/model/
    """
    from mmimpute import registry

    found = new_table(f"Models at {escape(model)}", "model", "fitted", "records", "what it is", "decision")
    for entry in registry.listed(model):
        rows = "-" if entry.rows is None else f"{entry.rows:,}"
        found.add_row(entry.digest[:12], entry.fitted or "-", rows, entry.role, escape(entry.reason or "-"))
    console.print(found)


@operate_app.command()
def rollback(model: ModelUrl) -> None:
    """Make the former champion the champion again. A second call goes back one further.

    The one that was rolled back is not promoted again by `mmimpute retrain` or `run`, but a challenger of newer data may be.

    Example: mmimpute rollback --model s3://bucket/model/
    """
    from mmimpute import registry

    console.print(f"champion again: model {registry.rollback(model)[:12]}")


@operate_app.command()
def run(config: Annotated[Path, typer.Argument(help="the run's configuration, a TOML file")]) -> None:
    """Run the whole job as a Prefect flow: plan, fit, evaluate, impute, commit, report.

    Example: mmimpute run run.toml    (on a Prefect server where PREFECT_API_URL is set)

    The file: title, spec (a path or a table), shards, model, output, and optional tables \\[fit], \\[impute], \\[cluster].
    """
    from mmimpute import launch

    output = read_config(config).output  # mistakes are told before Prefect starts
    code = launch.run_flow(config)
    if code in (0, 3):
        launch.show_run(output)
    raise typer.Exit(code)


@operate_app.command()
def watch_drops(config: Annotated[Path, typer.Argument(help="the run's configuration, a TOML file")]) -> None:
    """Look once whether a new data drop lies among the shards, and tell the Prefect server when it is whole.

    Example: mmimpute watch-drops run.toml    (deployed, it looks every five minutes: see `mmimpute deploy`)
    """
    from mmimpute import launch

    read_config(config)
    raise typer.Exit(launch.execute("drops", str(config)))


@operate_app.command()
def deploy(
    config: Annotated[Path, typer.Argument(help="the run's configuration, a TOML file")],
    name: Annotated[str, typer.Option(help="of the cohort's deployments and work queue; default: from the title")] = "",
    pool: Annotated[str, typer.Option(help="Prefect work pool; made as a process pool where there is none")] = "mmimpute",
    file: Annotated[Path | None, typer.Option(help="a changed copy of flows/prefect.yaml")] = None,
) -> None:
    """Register scheduled runs, data drops, retraining and the watcher with the Prefect server of PREFECT_API_URL.

    Example: PREFECT_API_URL=http://127.0.0.1:4200/api mmimpute deploy run.toml

    Deployed again under the same name, they are renewed. Runs of a cohort wait for each other in its work queue.
    """
    from mmimpute import launch

    cohort = name or launch.slug(read_config(config).title)
    code = launch.execute("deploying", str(config), cohort, pool, *([str(file)] if file else []))
    if not code:
        deployed = ", ".join(f"{flow}/{cohort}" for flow in ("population-run", "data-drop", "retrain", "watch"))
        console.print(f"deployed: {escape(deployed)}; start a worker with `prefect worker start --pool {escape(pool)}`")
    raise typer.Exit(code)


@operate_app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="the run's configuration; default: the demo's")] = None,
    home: Annotated[Path, typer.Option(help="where the object store and Prefect keep what they need")] = DEFAULT_HOME,
    port: Annotated[int, typer.Option(help="of Prefect's server and user interface")] = 4200,
) -> None:
    """Try deployments out on this machine: an object store, a Prefect server, a worker and a deployed cohort, until Ctrl-C.

    Example: mmimpute serve
    """
    from mmimpute import launch
    from mmimpute.demo import prepare

    config = config or prepare(home, 0)
    raise typer.Exit(launch.execute("serving", str(home), str(port), str(config), launch.slug(read_config(config).title)))


@runs_app.callback(invoke_without_command=True)
def runs(context: typer.Context, output: Annotated[str, typer.Option(help=TABLE_HELP)] = "") -> None:
    """List the runs that made a table, the newest first.

    Example: mmimpute runs --output s3://bucket/enriched/
    """
    if context.invoked_subcommand is None:
        from mmimpute.runs import list_runs

        if not output:
            raise typer.BadParameter("give the URL of the table", param_hint="--output")
        console.print(runs_table(list_runs(output)))


@runs_app.command("show")
def show(
    run: Annotated[str, typer.Argument(help="its name, as `mmimpute runs` lists it")],
    output: Annotated[str, typer.Option(help=TABLE_HELP)],
) -> None:
    """Show what one run did, and to which shards it took longest.

    Example: mmimpute runs show impute-20260101T020000Z-1a2b3c4d --output s3://bucket/enriched/
    """
    from mmimpute.runs import show_run

    for part in run_tables(*show_run(output, run)):
        console.print(part)
