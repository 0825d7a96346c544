"""The command line: it parses, calls one job, and shows what came of it."""

from datetime import timedelta
from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.markup import escape

from mmimpute import __version__
from mmimpute.commands.classify import classify_app
from mmimpute.commands.features import features_app
from mmimpute.commands.finish import finish
from mmimpute.commands.operate import operate_app
from mmimpute.commands.options import DEFAULT_HOME, Address, ModelUrl, written
from mmimpute.commands.standards import export_app, ingest_app
from mmimpute.commands.store import store_app
from mmimpute.commands.tasks import task_tables, tasks_app
from mmimpute.console import (
    accuracy_table,
    console,
    drift_tables,
    new_table,
    problems_table,
    report_errors,
    show_study,
    watch,
)
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.errors import UserError
from mmimpute.simulation import SHARD_ROWS, Population
from mmimpute.spec import (
    LABELLED,
    ClusterSettings,
    DriftSettings,
    EvaluateSettings,
    FitSettings,
    ImputeSettings,
    Task,
    read_spec,
    validated,
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
app.add_typer(operate_app)
app.add_typer(tasks_app)
app.add_typer(classify_app)
app.add_typer(store_app, name="store")
app.add_typer(features_app, name="features")
app.add_typer(ingest_app, name="ingest")
app.add_typer(export_app, name="export")
evaluate_app = typer.Typer(invoke_without_command=True)
app.add_typer(evaluate_app, name="evaluate")

Shards = Annotated[str, typer.Option(help="URL of the cohort's Parquet shards: s3://bucket/prefix or a folder")]
Output = Annotated[str, typer.Option(help="URL to write to")]
MOST_FEATURES = 12  # shown of a modality


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Fill in the missing modalities of patient records, at population scale.

    Start with `mmimpute demo`, or with `mmimpute describe` on your own shards.
    """
    if version:
        console.print(__version__)
        raise typer.Exit


@app.command()
def describe(
    shards: Annotated[str, typer.Argument(help="URL of the cohort's Parquet shards: s3://bucket/prefix or a folder")],
    write: Annotated[Path | None, written("write the drafted cohort spec to this file")] = None,
    address: Address = None,
) -> None:
    """Profile the shards in one streaming pass and draft the cohort spec.

    Example: mmimpute describe s3://bucket/cohort/ --write cohort.toml
    """
    from mmimpute import jobs

    found = jobs.describe_cohort(shards, ClusterSettings(address=address), watch("describe"))
    _show_profile(found["profile"])
    if write:
        write.write_text(found["spec"], encoding="utf-8")
        console.print(f"\nspec drafted: {escape(str(write))}")
    else:
        console.print("\n" + escape(found["spec"]))
    finish(found["set_aside"])


def _show_profile(profile: dict) -> None:
    names, rows = list(profile["modalities"]), profile["rows"]
    overview = new_table(f"{rows:,} records", "modality", "records", "share", "features", "values observed", "kinds")
    together = new_table("Records that hold both", "modality", *names)
    for at, (name, m) in enumerate(profile["modalities"].items()):
        kinds = ", ".join(sorted({f["kind"] for f in m["features"]}))
        observed = sum(f["observed"] for f in m["features"]) / max(1, rows * len(m["features"]))
        overview.add_row(name, f"{m['present']:,}", f"{m['present'] / rows:.1%}", str(len(m["features"])), f"{observed:.1%}", kinds)
        together.add_row(name, *(f"{n:,}" if n >= SMALLEST_GROUP or n == 0 else f"<{SMALLEST_GROUP}" for n in profile["together"][at]))
    features = new_table("Features (ranges leave out the ten lowest and highest)", "feature", "kind", "observed", "mean", "std", "range")
    for name, m in profile["modalities"].items():
        for f in m["features"][:MOST_FEATURES]:
            numbers = ["-" if f[k] is None else f"{f[k]:.4g}" for k in ("mean", "std", "low", "high")]
            features.add_row(f"{name}: {escape(f['name'])}", f["kind"], f"{f['observed']:,}", *numbers[:2], f"{numbers[2]} to {numbers[3]}")
        if len(m["features"]) > MOST_FEATURES:
            features.add_row(f"{name}: and {len(m['features']) - MOST_FEATURES} more")
    for table in (overview, together, features):
        console.print(table)


@app.command()
def fit(
    spec: Annotated[Path, typer.Option(help="the cohort spec, a TOML file")],
    shards: Shards,
    model: Annotated[str, typer.Option(help="URL to keep the model at")],
    workers: Annotated[int, typer.Option(help="training workers; 0 = one per GPU, or one")] = 0,
    epochs: Annotated[int | None, typer.Option(help="at most; default: by the number of records")] = None,
    seed: int = 0,
    pattern: Annotated[bool, typer.Option("--pattern/--no-pattern", help="what is missing of a record is an input too")] = True,
    address: Address = None,
) -> None:
    """Fit a model to a cohort and make it the champion; a second call resumes, or finds that the model still stands.

    No comparison is made with the champion that was: `mmimpute retrain` does that, and `mmimpute rollback` returns to it.

    Example: mmimpute fit --spec cohort.toml --shards s3://bucket/cohort/ --model s3://bucket/model/
    """
    from mmimpute import planning, retraining

    settings = validated(FitSettings, {"workers": workers, "epochs": epochs, "seed": seed, "pattern": pattern}, "fit")
    cohort = read_spec(spec)
    found = planning.survey(shards, cohort)
    fitted = retraining.renew(found, cohort, model, settings, None, ClusterSettings(address=address), watch("fit"))
    what = f"fitted in {fitted['seconds']:.0f} s" if fitted["trained"] else "still stands for this data"
    console.print(f"model {fitted['digest'][:12]} {what}: {escape(fitted['model'])}")
    finish(found.set_aside | fitted["set_aside"])


@app.command()
def impute(
    model: ModelUrl,
    shards: Shards,
    output: Output,
    interval: Annotated[float, typer.Option(help="also write an interval of this coverage: 0.5, 0.8, 0.9 or 0.95; 0 = none")] = 0,
    draws: Annotated[int, typer.Option(help="also write this many joint draws of what is missing")] = 0,
    latent: Annotated[bool, typer.Option(help="also write z0, the shared latent mean")] = False,
    seed: int = 0,
    prune: Annotated[bool, typer.Option("--prune", help="what was made from inputs that are gone leaves the table")] = False,
    actors: Annotated[int, typer.Option(help="imputing actors; 0 = one per CPU")] = 0,
    gpus_per_actor: float = 0,
    address: Address = None,
) -> None:
    """Write enriched shards and commit them as the next version of a Delta table.

    Example: mmimpute impute --model s3://bucket/model/ --shards s3://bucket/cohort/ --output s3://bucket/enriched/
    """
    from mmimpute import jobs

    settings = validated(ImputeSettings, {"interval": interval, "draws": draws, "latent": latent, "seed": seed}, "impute")
    cluster = validated(ClusterSettings, {"address": address, "actors": actors, "gpus_per_actor": gpus_per_actor}, "impute")
    done = jobs.impute_cohort(model, shards, output, settings, cluster, watch("impute"), prune)
    committed = done["committed"]
    console.print(
        f"{done['rows']:,} records imputed in {done['seconds']['all']:.0f} s "
        f"({done['done_before']} of {done['shards']} shards were done before); "
        f"table version {committed['version']}, {committed['added']} objects added and {committed['removed']} removed: {escape(output)}"
    )
    finish(done["set_aside"])


@app.command()
def verify(
    model: ModelUrl,
    shards: Shards,
    output: Annotated[str, typer.Option(help="URL of the table, as given to `mmimpute impute`")],
    address: Address = None,
) -> None:
    """Hold the table against the shards: each has one output, what was observed is as it was, nothing missing is left.

    Exit code 3 where something is wrong. The model says which columns are imputed; it need not be the one that imputed them.

    Example: mmimpute verify --model s3://bucket/model/ --shards s3://bucket/cohort/ --output s3://bucket/enriched/
    """
    from mmimpute import jobs

    found = jobs.verify_table(model, shards, output, ClusterSettings(address=address), watch("verify"))
    wrong = f"{len(found['problems'])} with something wrong" if found["problems"] else "all is well"
    console.print(f"table version {found['version']}: {found['shards']:,} shards, {found['rows']:,} records compared, {wrong}")
    if found["problems"]:
        console.print(problems_table(found["problems"]))
        raise typer.Exit(3)


@app.command()
def vacuum(
    output: Annotated[str, typer.Argument(help="URL of the table, as given to `mmimpute impute --output`")],
    older_than: Annotated[float, typer.Option(min=0, help="hours; must be longer than a run that may still commit what it wrote")] = 168,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say how much there is")] = False,
) -> None:
    """Remove enriched objects that no version of the table refers to: what runs left that died before their commit.

    Example: mmimpute vacuum s3://bucket/enriched/ --dry-run
    """
    from mmimpute.data import table

    found = table.vacuum(output, timedelta(hours=older_than), dry_run)
    what = "would be removed" if dry_run else "removed"
    console.print(f"{len(found):,} objects, {sum(o.size for o in found) / 1e6:,.1f} MB, {what}: {escape(output)}")


@app.command()
def alerts(
    rules: Annotated[Path, typer.Option(help="the alert rules, a TOML file")],
    model: ModelUrl,
    output: Annotated[str, typer.Option(help="URL of the enriched table, as given to `mmimpute impute`")],
    to: Annotated[str, typer.Option(help="URL of the table of outreach lists; it holds subject ids")],
) -> None:
    """Hold rules against the enriched table and list whom they are about: who probably has what is not on record.

    Example: mmimpute alerts --rules rules.toml --model s3://bucket/model/ --output s3://bucket/enriched/ --to s3://bucket/outreach/
    """
    from mmimpute import jobs
    from mmimpute.alerts import shown
    from mmimpute.spec import read_rules

    done = jobs.alert_table(model, output, read_rules(rules), to, watch("alerts"))
    console.print(f"table version {done['version']}: {done['new']} of {done['shards']} shards were new; lists: {escape(to)}")
    for rule, people in done["counts"].items():
        console.print(f"  {escape(rule)}: {shown(people)} people")


@app.command()
def generate(
    model: ModelUrl,
    output: Output,
    n: Annotated[int, typer.Option("--n", min=1, help="number of synthetic records")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    address: Address = None,
) -> None:
    """Write synthetic records: all modalities, the cohort's columns, subject ids marked as synthetic.

    Example: mmimpute generate --model s3://bucket/model/ --n 100000 --output s3://bucket/synthetic/
    """
    from mmimpute import jobs

    done = jobs.generate_cohort(model, output, n, seed, ClusterSettings(address=address), watch("generate"))
    console.print(f"{done['rows']:,} synthetic records in {done['shards']} shards: {escape(output)}")


@app.command()
def generate_cohort(
    output: Annotated[str, typer.Argument(help="URL to write to: s3://bucket/prefix or a folder, empty or of the same cohort")],
    rows: Annotated[int, typer.Option(min=1, help="number of records")],
    width: Annotated[int, typer.Option(min=16, help="features of a record, over its four modalities")] = Population.width,
    shard_rows: Annotated[int, typer.Option(min=1, help="records of a shard")] = SHARD_ROWS,
    missing: Annotated[float, typer.Option(min=0, max=0.6, help="mean share of records that lack a modality")] = Population.missing,
    not_at_random: Annotated[float, typer.Option(min=0, help="how much that depends on a record's hidden state; 1 = strongly")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    truth: Annotated[bool, typer.Option("--truth", help="also write the complete values and z0, to OUTPUT/truth")] = False,
) -> None:
    """Write a simulated cohort whose truth is known, for tests of scale and of what a model recovers.

    OUTPUT/shards holds the shards, OUTPUT/cohort.toml their spec. Vitals, labs, rna (real) and codes (binary) share a latent z0.
    Linear methods miss much of what it tells; `mmimpute.simulation.Population` has the best possible imputation in closed form.
    A second call with the same settings writes what is not there yet.

    Example: mmimpute generate-cohort s3://bucket/simulated/ --rows 1000000 --width 256
    """
    from mmimpute import simulating

    population = Population(seed=seed, width=width, missing=missing, not_at_random=not_at_random)
    done = simulating.write_cohort(population, output, rows, shard_rows, truth, watch("generate-cohort"))
    console.print(
        f"{done['rows']:,} simulated records in {done['shards']} shards ({done['done_before']} were done before): {escape(output)}"
    )


@evaluate_app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="URL of the model, as given to `mmimpute fit`  \\[required]")] = None,
    shards: Annotated[str | None, typer.Option(help="URL of the cohort's Parquet shards  \\[required]")] = None,
    tasks: Annotated[str, typer.Option(help="also any of coherence,quality,likelihood,probe,retrieval, or all")] = "",
    label: Annotated[str | None, typer.Option(help="outcome column of a few classes: what coherence, quality and probe are about")] = None,
    json: Annotated[Path | None, written("write what was found to this file")] = None,
    report: Annotated[Path | None, written("write an HTML page with plots to this file")] = None,
    address: Address = None,
) -> None:
    """Score the model and each of its experts on people not seen, against the column mean; and what else it is asked.

    Do generated modalities agree with the others, do samples look real, how probable are new people, how much does z0 tell of a
    label, and can someone's other modality be found among all people's?

    Example: mmimpute evaluate --model s3://bucket/model/ --shards s3://bucket/cohort/ --tasks all --label outcome__died
    """
    if context.invoked_subcommand:
        return
    for name, given in (("model", model), ("shards", shards)):  # a subcommand has its own
        if given is None:
            context.fail(f"Missing option '--{name}'.")
    from mmimpute import jobs, planning, registry

    chosen = _names(tasks) if tasks != "all" else [t for t in get_args(Task) if label or t not in LABELLED]
    settings = validated(EvaluateSettings, {"tasks": chosen, "label": label}, "--tasks")
    place = registry.locate(model)
    found = planning.survey_for(shards, registry.describe(place).cohort)
    evaluation = jobs.evaluate_model(found, place, ClusterSettings(address=address), settings)
    for table in (accuracy_table(evaluation), *task_tables(evaluation.get("tasks", {}))):
        console.print(table)
    if json:
        json.write_text(dumps(evaluation, indent=1), encoding="utf-8")
    if report:
        from mmimpute.report import render  # matplotlib is for those who want pages

        report.write_text(
            render({"title": f"Evaluation of model {registry.digest_of(place)[:12]}", "evaluation": evaluation}), encoding="utf-8"
        )
    finish(found.set_aside)


@evaluate_app.command()
def downstream(
    context: typer.Context,
    model: ModelUrl,
    shards: Annotated[str | None, typer.Option(help="URL of the cohort's shards, outcomes included: imputed here, in memory")] = None,
    output: Annotated[str | None, typer.Option(help="or URL of the enriched table, imputed with --draws")] = None,
    outcome: Annotated[str | None, typer.Option(help="column that says who has the outcome")] = None,
    event: Annotated[str | None, typer.Option(help="or, with --time, column that says whose follow-up ended with the event")] = None,
    time: Annotated[str | None, typer.Option(help="column: until when people were followed")] = None,
    equals: Annotated[str | None, typer.Option(help="value of that column that is the event; default: 1 of 0 and 1")] = None,
    features: Annotated[str, typer.Option(help="covariates, such as labs__sodium,rna\\[ESR1]; default: every number")] = "",
    exclude: Annotated[str, typer.Option(help="modalities or features that must not be used: what the outcome was made from")] = "",
    draws: Annotated[int, typer.Option(min=2, help="completed data sets, with --shards")] = 20,
    seed: int = 0,
) -> None:
    """Compare outcome models on complete cases, mean-filled, imputed and multiply imputed covariates.

    Logistic regression for --outcome, Cox regression for --time and --event. Estimates where each covariate has ten people of the
    rarer kind; predictions are ridge-penalised and cross-validated.

    Example: mmimpute evaluate downstream --model s3://bucket/model/ --shards s3://bucket/cohort/ --outcome outcome__died
    """
    if (shards is None) == (output is None):
        context.fail("give either --shards or --output")
    if (outcome is None) == (event is None) or (event is None) != (time is None):
        context.fail("give either --outcome, or --time and --event")
    if find_spec("statsmodels") is None:
        raise UserError("outcome models need statsmodels: pip install 'mmimpute[downstream]'")
    from mmimpute import registry, studying
    from mmimpute.downstream import compare

    asked = studying.Question(outcome or event, equals, time, _names(features), _names(exclude))
    if shards:
        study = studying.from_shards(registry.load(model), shards, asked, draws, seed)
    else:
        study = studying.from_table(registry.describe(model).cohort, output, asked)
    show_study(compare(study, seed))


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


@app.command()
def drift(model: ModelUrl, shards: Shards, address: Address = None) -> None:
    """Compare new shards with the data that the model was fitted on, and say whether it should be fitted anew.

    Distributions of features, what is missing, codes never seen, and how well the model predicts each modality. What chance
    explains is no drift, so small drops have to differ more. Exit code 0 either way.

    Example: mmimpute drift --model s3://bucket/model/ --shards s3://bucket/cohort/2026-11/
    """
    from mmimpute import jobs, registry
    from mmimpute.data.shards import list_shards

    place = registry.locate(model)
    found = jobs.check_drift(shards, list_shards(shards), place, DriftSettings(), ClusterSettings(address=address), watch("drift"))
    for table in drift_tables(found):
        console.print(table)
    verdict = "drifted: fit the model anew" if found["drifted"] else "no drift" if found["judged"] else "not judged"
    console.print("\n  ".join([verdict, *map(escape, found["reasons"])]))
    finish(found["set_aside"])


@app.command()
def demo(
    rows: Annotated[int, typer.Option(help="resample the cohort to this many records; 0 = as it is")] = 0,
    home: Annotated[Path, typer.Option(help="where the object store, the configuration and the report go")] = DEFAULT_HOME,
) -> None:
    """Run the main job on real data: NHANES 2017-2018 in an object store on this machine.

    Example: mmimpute demo --rows 1000000
    """
    from mmimpute.demo import run_demo

    raise typer.Exit(run_demo(home, rows))


def main() -> None:
    """The console command: errors that a user can mend are one message and an exit code."""
    with report_errors():
        app()


if __name__ == "__main__":
    main()
