"""The stages of a population-scale run. Between them travel URLs and small records; each resumes what it finds done.

plan -> fit -> evaluate -> impute -> commit -> alerts (where there are rules) -> report. What a run leaves behind stands
under `<output>/_runs`, which readers of the table do not see.
"""

import json
from datetime import UTC, datetime
from typing import Any

import mmimpute
from mmimpute import drops, jobs, planning, registry, retraining
from mmimpute.data import storage
from mmimpute.data.shards import fetch_table, list_shards, publish_table
from mmimpute.data.table import digest, outstanding, rows_of, table_state
from mmimpute.errors import DataError, SetAside, Unreachable, UserError
from mmimpute.jobs import Progress, ignore
from mmimpute.planning import Survey
from mmimpute.spec import RunConfig

Record = dict[str, Any]


def _runs(config: RunConfig) -> str:
    return storage.join(config.output, "_runs")


def plan(config: RunConfig) -> Record:
    """Lists the shards, checks footers and says what is new.

    Every footer, against the spec; where the champion imputes as it is, only footers of shards that the table was not made from,
    against the champion's schema. Returns {plan, shards, rows, new, set_aside}; `plan` names the file that the other stages read.
    """
    found = _survey(config)
    name = f"plan-{digest(found.fingerprint, config.model_dump_json())}.parquet"
    publish_table(_runs(config), name, planning.to_table(found))
    new = len(found.shards)
    if _standing(config, found):
        new = len(outstanding(config.output, jobs.expected_outputs(found, registry.locate(config.model), config.impute)))
    total = len(found.shards) + len(found.set_aside)
    return {"plan": name, "shards": total, "rows": found.rows, "new": new, "set_aside": found.set_aside}


def _survey(config: RunConfig) -> Survey:
    place = champion(config)
    if config.retrain or place is None:
        return planning.survey(config.shards, config.spec)
    shards = list_shards(config.shards)
    new = drops.pending(shards, config.output)
    rows = rows_of(config.output, set(shards).difference(new))  # not those of versions before, or of inputs that are gone
    return planning.survey_new(config.shards, shards, new, rows, registry.describe(place).cohort)


def champion(config: RunConfig) -> str | None:
    """URL of the champion that stands before the run."""
    name = registry.champion(config.model)
    return name and storage.join(config.model, name)


def _standing(config: RunConfig, found: Survey) -> str | None:
    """The champion's digest, if the run will impute with it as it is."""
    if not config.retrain:
        return registry.champion(config.model)
    return retraining.standing_champion(config.model, jobs.fingerprint(found, config.fit), config.gate)


def read_plan(config: RunConfig, name: str) -> Survey:
    return planning.from_table(fetch_table(_runs(config), name))


def fit(config: RunConfig, plan_name: str, on_progress: Progress = ignore) -> Record:
    """The champion that the run imputes with: the one that stands, or what `retraining.renew` makes of it. Returns what that does."""
    found = read_plan(config, plan_name)
    name = registry.champion(config.model)
    if name and not config.retrain:
        return jobs.known_model(config.model, name, jobs.fingerprint(found, config.fit)) | {"reason": retraining.STANDS}
    return retraining.renew(found, config.spec, config.model, config.fit, config.gate, config.cluster, on_progress)


def challenge(config: RunConfig, plan_name: str, on_progress: Progress = ignore) -> Record:
    """Fits a challenger, or finds it. Returns what `jobs.fit_model` does."""
    return jobs.fit_model(read_plan(config, plan_name), config.model, config.fit, config.cluster, on_progress)


def judge(config: RunConfig, plan_name: str, challenger: str) -> Record:
    """Holds a challenger, by its digest, against the champion. Returns the decision (see `retraining.judge_model`)."""
    return retraining.judge_model(read_plan(config, plan_name), config.spec, config.model, challenger, config.gate, config.cluster)


def model_card(model: str) -> str:
    """The page that stands beside a model, in Markdown."""
    return storage.read(model, "card.md").decode()


def settle(config: RunConfig, fitted: Record, decision: Record) -> Record:
    """Promotes the challenger, or keeps it. Returns what `retraining.settle` does."""
    return retraining.settle(config.model, fitted, decision)


def evaluate(config: RunConfig, plan_name: str, model: str) -> Record:
    """Accuracy and tasks out of fold, kept beside the model. Returns {rows, skill: {modality: skill}}."""
    found = registry.read_record(model, "evaluation")
    if found is None or (config.evaluate.tasks and found.get("settings") != config.evaluate.model_dump(mode="json")):
        found = jobs.evaluate_model(read_plan(config, plan_name), model, config.cluster, config.evaluate)
        registry.write_record(model, "evaluation", found)
    return {"rows": found["rows"], "skill": {name: m["skill"] for name, m in found["modalities"].items()}}


def impute(config: RunConfig, plan_name: str, model: str, on_progress: Progress = ignore) -> Record:
    """Imputes and publishes every shard that has no enriched version yet. Returns what `jobs.impute_table` does."""
    return jobs.impute_table(read_plan(config, plan_name), model, config.output, config.impute, config.cluster, on_progress)


def commit(config: RunConfig, plan_name: str, model: str, imputed: Record) -> Record:
    """Makes the enriched shards the table's next version. imputed: what `impute` returned. Returns what `jobs.commit_table` does."""
    return jobs.commit_table(read_plan(config, plan_name), model, config.output, config.impute, config.prune, imputed)


def drift(config: RunConfig, plan_name: str, model: str, on_progress: Progress = ignore) -> Record:
    """Compares the shards that the table was not made from yet with the data that a model was fitted on.

    Returns what `jobs.check_drift` does and `record`, the URL where that is kept; without new shards that are good inside
    {drifted: False, reasons: [], shards, set_aside}. Where the run retrains, a model that nothing can be compared with (of another
    spec, or without a reference) gives the same and `not_compared`, the reason: what is about to be fitted mends it.
    """
    found = read_plan(config, plan_name)
    drop = drops.pending(found.shards, config.output)
    if not drop:
        return {"drifted": False, "reasons": [], "shards": 0, "set_aside": {}}
    versions = (f"{s.key} {s.etag}" for s in drop)
    name = f"drift-{digest(registry.digest_of(model), config.drift.model_dump_json(), *versions)}.json"
    if storage.exists(_runs(config), name):
        return json.loads(storage.read(_runs(config), name))
    try:
        checked = jobs.check_drift(found.url, drop, model, config.drift, config.cluster, on_progress)
    except DataError as error:
        return {"drifted": False, "reasons": [], "shards": len(drop), "set_aside": {error.shard: str(error)}}
    except UserError as error:
        if isinstance(error, Unreachable) or not config.retrain:
            raise
        why = f"the champion is of another spec, or of an older version: {error}"
        return {"drifted": False, "reasons": [], "shards": len(drop), "set_aside": {}, "not_compared": why}
    checked["record"] = storage.join(_runs(config), name)
    storage.write(_runs(config), name, json.dumps(checked).encode())
    return checked


def asks_for_retraining(config: RunConfig, stages: dict[str, Record]) -> list[str]:
    """Why a challenger should be trained, in words: the drop has drifted, or the cohort has grown. Empty: no reason."""
    trained_on = registry.read_record(stages["fit"]["model"], "fitted")["rows"]
    growth = stages["plan"]["rows"] / trained_on - 1
    grown = [f"{growth:.0%} more records than the champion was trained on"] if growth >= config.growth else []
    return [*stages.get("drift", {}).get("reasons", []), *grown]


def alerts(config: RunConfig, model: str, on_progress: Progress = ignore) -> Record:
    """Holds the rules against the table and lists whom they are about. Returns {version, shards, new, counts: {rule: people, or "<10"}}."""
    from mmimpute.alerts import shown

    done = jobs.alert_table(model, config.output, config.alerts, config.alerts_to, on_progress)
    return done | {"counts": {rule: shown(people) for rule, people in done["counts"].items()}}


def report(config: RunConfig, stages: dict[str, Record], seconds: dict[str, float]) -> Record:
    """Writes the run's record and its HTML report, once per version of the table. Returns {report, record}."""
    from mmimpute.report import render  # matplotlib is not for those who only impute

    model, done = stages["fit"]["model"], stages["commit"]
    name = f"{done['version']:06d}-{registry.digest_of(model)[:8]}"
    places = {"report": storage.join(_runs(config), f"{name}.html"), "record": storage.join(_runs(config), f"{name}.json")}
    told = not done["added"] and not done["removed"] and storage.exists(_runs(config), f"{name}.html")
    if told and not stages.get("alerts", {}).get("new"):
        return places
    before = json.loads(storage.read(_runs(config), f"{name}.json")) if told else _run_record(config, stages, seconds, places)
    run = before | {"alerts": _alerts(config, stages)}
    storage.write(_runs(config), f"{name}.json", json.dumps(run).encode())
    storage.write(_runs(config), f"{name}.html", render(run).encode())
    return places


def _alerts(config: RunConfig, stages: dict[str, Record]) -> list[Record]:
    """Per rule its message and how many people it is about."""
    counts = stages.get("alerts", {}).get("counts", {})
    return [{"rule": rule, "message": config.alerts.rules[rule].message, "people": people} for rule, people in counts.items()]


def _run_record(config: RunConfig, stages: dict[str, Record], seconds: dict[str, float], places: dict[str, str]) -> Record:
    planned, fitted, imputed, done = (stages[s] for s in ("plan", "fit", "impute", "commit"))
    aside = set_aside(stages)
    counts = done["counts"] or {"rows": 0, "from_prior": 0, "imputed": {}}
    wanted = {name for name, m in config.spec.modalities.items() if m.impute}
    return {
        "title": config.title,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "phases": imputed["seconds"],
        "version": mmimpute.__version__,
        "model_digest": fitted["digest"],
        "model_url": fitted["model"],
        "table_url": config.output,
        "report_url": places["report"],
        "table_version": done["version"],
        "shards": {
            "total": planned["shards"],
            "new": done["added"],
            "already_done": imputed["done_before"],
            "set_aside": [{"shard": shard, "error": error} for shard, error in sorted(aside.items())],
        },
        "rows": counts["rows"],
        "from_prior": counts["from_prior"],
        "imputed": {name: entry for name, entry in counts["imputed"].items() if name in wanted},
        "profile": registry.read_record(fitted["model"], "profile"),
        "history": registry.read_record(fitted["model"], "history"),
        "evaluation": registry.read_record(fitted["model"], "evaluation"),
        "drift": stages["drift"] if "record" in stages.get("drift", {}) else None,  # nothing was compared where nothing is new
    }


def set_aside(stages: dict[str, Record]) -> dict[str, str]:
    """Every shard that some stage set aside, with the reason."""
    found = (stages.get(name, {}).get("set_aside", {}) for name in ("plan", "fit", "challenge", "impute", "commit"))
    return {shard: error for aside in found for shard, error in aside.items()}


def raise_if_set_aside(aside: dict[str, str]) -> None:
    """Good shards are published by now; the run as a whole still has to be seen as failed. Raises SetAside."""
    if aside:
        raise SetAside(aside)


def last_record(output: str) -> Record | None:
    """The record of the run that made the table's newest version."""
    version = table_state(output).version
    if version is None:
        return None
    names = [o.key for o in storage.list_objects(storage.join(output, "_runs"), ".json") if o.key.startswith(f"{version:06d}-")]
    return json.loads(storage.read(storage.join(output, "_runs"), names[-1])) if names else None
