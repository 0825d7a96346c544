"""What people see on a terminal: progress, tables, and errors without tracebacks."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmimpute.errors import MmimputeError

SLOWEST = 5  # shards of a run that are shown
LEFT = ("modality", "feature", "kind", "kinds", "range", "model", "fitted", "what it is", "decision")  # columns of text
LOG_WIDTH = 140  # of what is no terminal
console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_WIDTH)


@contextmanager
def report_errors() -> Iterator[None]:
    """What a user can mend is told in one message, and its exit code: 2 for settings, 3 for data."""
    try:
        yield
    except MmimputeError as error:
        errors.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)


def watch(title: str) -> Callable[[dict], None]:
    """A progress callback that prints one line per step worth telling; lines, so that logs keep them too."""
    began, shown = time.monotonic(), -1

    def update(record: dict) -> None:
        nonlocal shown
        if "epoch" in record:
            console.print(
                f"  {title}: epoch {record['epoch']}/{record['epochs']}  tune loss {record['tune_loss']:.4f}  "
                f"{record['rows_per_second']:,.0f} records/s"
            )
            return
        what = next(k for k in ("imputed", "generated", "profiled", "verified", "listed") if k in record)
        done = record[what]
        tenth = 10 * done // record["of"]
        if tenth == shown:
            return
        shown = tenth
        seconds = time.monotonic() - began
        what = what if what in ("profiled", "verified", "listed") else "done"
        rows = f", {record['rows']:,} records, {record['rows'] / seconds:,.0f} a second" if "rows" in record else ""
        left = f", {seconds * (record['of'] - done) / done:,.0f} s left" if done < record["of"] else ""
        console.print(f"  {title}: {done} of {record['of']} shards {what}{rows}{left}")

    return update


def new_table(title: str, *columns: str) -> Table:
    """Numbers to the right, texts to the left."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in LEFT else "right")
    return table


def accuracy_table(evaluation: dict) -> Table:
    """Imputation accuracy per modality by members that had not seen the record, against the column mean."""
    table = Table(title="Accuracy, each modality hidden in turn from people not seen (column mean: skill 0, R2 0, AUROC 0.5)")
    table.caption = "experts alone: without categorical features"
    columns = ("records", "skill", "VAE alone", "additive", "Gaussian", "R2", "AUROC", "90% interval covers", "ECE")
    for name, justify in (("modality", "left"), *((n, "right") for n in columns)):
        table.add_column(name, justify=justify)
    for name, found in evaluation["modalities"].items():
        alone = [found["experts"].get(expert) for expert in ("vae", "additive", "gaussian")]
        cells = [found["skill"], *alone, found["r2"], found["auroc"]]
        cover = f"{found['interval90']:.1%}" if found["interval90"] is not None else "-"
        ece = f"{found['ece']:.3f}" if found["ece"] is not None else "-"
        table.add_row(name, f"{found['rows']:,}", *("-" if c is None else f"{c:.3f}" for c in cells), cover, ece)
    return table


SHOWN_FEATURES = 15


def drift_tables(found: dict) -> list[Table]:
    """What `drift.compare` found: the worst features and all modalities."""
    features = Table("feature", title=f"{found['rows']:,} records beside the training data: the features that differ most")
    modalities = Table("modality", title="Modalities")
    for table, names in ((features, ("PSI", "by chance", "never seen")), (modalities, ("log score", "by chance"))):
        for name in (*names, "missing", "in training"):
            table.add_column(name, justify="right")
    for f in found["features"][:SHOWN_FEATURES]:
        psi = ["-" if f[name] is None else f"{f[name]:.3f}" for name in ("psi", "noise")]
        features.add_row(escape(f"{f['modality']}: {f['name']}"), *psi, f"{f['unseen']:.1%}", *_missing(f["missing"]))
    for name, m in found["modalities"].items():
        score = ["-", "-"] if m["score"] is None else [f"{m['score']['shift']:+.2f} sd", f"±{m['score']['noise']:.2f}"]
        modalities.add_row(name, *score, *_missing(m["missing"]))
    return [features, modalities] if found["judged"] else []


def _missing(found: dict | None) -> list[str]:
    return ["-", "-"] if found is None else [f"{found[name]:.1%}" for name in ("drop", "training")]


def set_aside_table(aside: list[dict]) -> Table:
    table = Table("shard", "set aside because", title="Shards set aside")
    for entry in aside:
        table.add_row(escape(entry["shard"]), escape(entry["error"]))
    return table


def problems_table(problems: dict[str, list[str]]) -> Table:
    table = Table("shard", "what is wrong", title="Shards that are not as they have to be")
    for shard, found in problems.items():
        table.add_row(escape(shard), escape("; ".join(found)))
    return table


def runs_table(runs: list) -> Table:
    """Of `runs.Run`s."""
    table = Table("run", "started (UTC)", title="Runs, newest first")
    for name in ("records", "shards", "done before", "set aside", "tries more", "seconds", "table version", "model"):
        table.add_column(name, justify="right")
    for run in runs:
        did = run.did or {"rows": 0, "shards": 0, "done_before": 0, "set_aside": 0, "retries": 0, "seconds": {"all": 0.0}}
        counts = [f"{did[k]:,}" for k in ("rows", "shards", "done_before", "set_aside", "retries")]
        version = "-" if run.version is None else str(run.version)
        table.add_row(run.name, run.started, *counts, f"{did['seconds']['all']:,.1f}", version, run.lineage["model_digest"][:12])
    return table


def run_tables(run, shards) -> Iterator[Table]:
    """A `runs.Run`, and of its shards (see `runs.show_run`) the slowest and those set aside."""
    about = Table("", "", title=run.name, show_header=False)
    told = {"started (UTC)": run.started, "table version": "none" if run.version is None else run.version}
    told |= {"mmimpute": run.lineage["version"], "model": run.lineage["model"], "settings": json.dumps(run.lineage["settings"])}
    told |= {f"inputs: {k}": v for k, v in run.lineage["inputs"].items()}
    told |= {f"seconds: {k}": f"{s:,.1f}" for k, s in run.did["seconds"].items()} if run.did else {}
    for name, value in told.items():
        about.add_row(name, escape(str(value)))
    yield about
    if shards is None:
        return
    slowest = Table("shard", "records", "seconds", "tries", title="Slowest shards")
    for row in shards.slice(0, SLOWEST).to_pylist():
        slowest.add_row(escape(row["shard"]), f"{row['rows']:,}", f"{row['seconds']:.2f}", str(row["tries"]))
    yield slowest
    aside = [{"shard": row["shard"], "error": row["error"]} for row in shards.select(["shard", "error"]).to_pylist() if row["error"]]
    if aside:
        yield set_aside_table(aside)


def show_study(found: dict) -> None:
    """What outcome models say on complete, filled and imputed covariates (see `downstream.compare`)."""
    console.print(
        f"{found['people']:,} people, {found['complete']} of them with every covariate; {found['informative']:,} of the rarer kind; "
        f"{found['covariates']} covariates"
    )
    estimates = Table(title="Estimates: log odds or log hazard per standard deviation of the covariate", caption=_left_out(found))
    for name in ("analysis", "covariate"):
        estimates.add_column(name)
    for name in ("estimate", "standard error", "95% interval", "missing information"):
        estimates.add_column(name, justify="right")
    for analysis, rows in found["estimates"].items():
        for r in rows or ():
            interval = f"{r['low']:+.3f} to {r['high']:+.3f}"
            cells = (f"{r['estimate']:+.3f}", f"{r['std_error']:.3f}", interval, f"{r['missing_information']:.0%}")
            estimates.add_row(analysis, escape(r["name"]), *cells)
    scores = Table("analysis", "on", "score", title="Predictions of people not learnt from")
    for analysis, groups in found["scores"].items():
        for group, metrics in groups.items():
            scores.add_row(analysis, group, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
    for part in (*([estimates] if any(found["estimates"].values()) else [_left_out(found)]), scores, *found["verdicts"]):
        console.print(part)


def _left_out(found: dict) -> str | None:
    lacking = [name for name, rows in found["estimates"].items() if rows is None]
    return f"no estimates of {', '.join(lacking)}: too many covariates for the events, or dependent ones; name fewer" if lacking else None
