"""The jobs that the command line and the flows call: each one runs on Ray and leaves its result in storage."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from datetime import UTC, datetime

import mmimpute
from mmimpute import heads, metrics, registry
from mmimpute.cluster import ingest, runtime
from mmimpute.cluster.impute import impute_shards
from mmimpute.data import labels, profile, storage, table
from mmimpute.data.reference import reference
from mmimpute.data.schema import CohortSchema
from mmimpute.data.shards import Shard, list_shards
from mmimpute.data.split import fold, held_out
from mmimpute.drafting import guess_spec, left_out, to_toml, without_free_text
from mmimpute.errors import SetAside, UserError
from mmimpute.generating import SHARD_ROWS
from mmimpute.imputing import PHASES, settings_digest
from mmimpute.model.config import ModelConfig
from mmimpute.planning import Survey, by_layout, columns_of, listed_for, survey, survey_for, survey_of
from mmimpute.sizing import model_config
from mmimpute.spec import (
    AlertRules,
    ClusterSettings,
    DriftSettings,
    EvaluateSettings,
    FinetuneSettings,
    FitSettings,
    ImputeSettings,
)

Progress = Callable[[dict], None]
LISTING_THREADS = 4  # lists are made of a few columns: what they wait for is the store
NO_TASKS = EvaluateSettings()
LABEL_SAMPLE = 5_000  # labelled people from whom the bins of contrastive labels are taken
ALL_IMPUTED = {"set_aside": {}, "metrics": None}
LEAST_ROWS = 60  # fewer records are no training data


def ignore(_: dict) -> None:
    """The progress callback of whoever does not watch."""


def describe_cohort(url: str, cluster: ClusterSettings, on_shard: Progress = ignore) -> dict:
    """Profiles all records and drafts the spec. Returns {profile, spec (TOML text), set_aside}."""
    arrow = columns_of(url)
    spec = guess_spec(arrow)
    with runtime.cluster(cluster):
        while True:
            found = survey(url, spec)
            seen, bad = _observe(found, on_shard)
            kept = without_free_text(spec, found.schema, seen)
            if kept == spec:
                break
            spec = kept  # what is left of the columns is profiled anew, without the text
    schema, seen = profile.settle(found.schema, seen)
    text = to_toml(spec, schema, left_out(spec, schema, arrow))
    return {"profile": profile.report(schema, seen), "spec": text, "set_aside": found.set_aside | bad}


def _observe(found: Survey, on_shard: Progress) -> tuple[profile.Statistics, dict[str, str]]:
    total = len(found.shards)
    return ingest.profile(found.url, found.shards, found.schema, found.rows, lambda done: on_shard({"profiled": done, "of": total}))


def fingerprint(found: Survey, settings: FitSettings) -> str:
    """What a model is fitted on: shards, spec, settings and version. How the work is divided and secured is no part of it."""
    chosen = settings.model_dump_json(exclude={"workers", "gpus_per_worker", "cache_share", "checkpoint_seconds"})
    return table.digest(found.fingerprint, chosen, mmimpute.__version__)


def fit_model(found: Survey, home: str, settings: FitSettings, cluster: ClusterSettings, on_progress: Progress = ignore) -> dict:
    """Fits a challenger, unless a model of this home was fitted on just this; it is nobody's champion yet.

    Returns {digest, model (its URL), trained, set_aside, seconds}.
    """
    from mmimpute.cluster import fit as training  # a second of imports that only this job needs; so below

    began = time.perf_counter()
    fitted_on = fingerprint(found, settings)
    name = registry.fitted_on(home, fitted_on)
    if name:
        return known_model(home, name, fitted_on)
    with runtime.cluster(cluster):
        seen, bad = _observe(found, on_progress)
        schema, seen = profile.settle(found.schema, seen)
        schema = _with_labels(found, bad, schema)
        rows = seen.rows
        if rows < LEAST_ROWS:
            raise UserError(f"{found.url}: {rows} records; a model needs {LEAST_ROWS} or more")
        statistics = profile.feature_statistics(schema, seen)
        layouts, config = _layouts(found, bad, schema), model_config(schema, rows, settings)
        start = _start(home, config) if settings.warm_start else None
        run = table.digest(fitted_on, start or "")
        holders = float(seen.present.mean())
        job = training.Job(run, found.url, layouts, schema, config, statistics, rows, holders, settings, start)
        fitted = training.fit(job, home, on_progress)
        name = registry.save(home, fitted.module, schema, fitted_on)
        place = storage.join(home, name)
        beside = {"profile": profile.report(schema, seen), "marginals": profile.marginals(schema, seen)}
        beside["reference"] = reference(schema, seen) | {"score": fitted.scores}
        facts = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "rows": rows, "shards": len(found.shards), "start": start}
        for record, value in (beside | {"history": fitted.history, "set_aside": bad, "fitted": facts}).items():
            registry.write_record(place, record, value)
        training.clear(home, run)
    return {"digest": name, "model": place, "trained": True, "set_aside": bad, "seconds": time.perf_counter() - began}


def known_model(home: str, name: str, fitted_on: str) -> dict:
    """What `fit_model` says of a model that need not be fitted. Set aside is what was so when a model was fitted on just this."""
    fitted = registry.fitted_on(home, fitted_on)
    aside = registry.read_record(storage.join(home, fitted), "set_aside") if fitted else None
    return {"digest": name, "model": storage.join(home, name), "trained": False, "set_aside": aside or {}, "seconds": 0.0}


def _start(home: str, config: ModelConfig) -> str | None:
    """The champion's place, where its sizes and kinds are these: then its member e has not seen fold e either."""
    name = registry.champion(home)
    return storage.join(home, name) if name and registry.load(home).module.config == config else None


def _with_labels(found: Survey, bad: dict[str, str], schema: CohortSchema) -> CohortSchema:
    """The labels of a contrastive cohort settled on a sample of its people."""
    if schema.contrastive is None:
        return schema
    good = [s for s in found.shards if s.key not in bad]
    sample = ingest.labelled(found.url, good, schema, schema.contrastive.columns, LABEL_SAMPLE)
    return schema.model_copy(update={"contrastive": labels.settle(schema.contrastive, sample.beside)})


def _layouts(found: Survey, bad: dict[str, str], schema: CohortSchema) -> list[list[Shard]]:
    """The shards that were not set aside, as `ingest.records` takes them."""
    columns = schema.columns + (schema.contrastive.columns if schema.contrastive else [])
    return by_layout(found.url, [s for s in found.shards if s.key not in bad], columns)


def evaluate_model(found: Survey, place: str, cluster: ClusterSettings, settings: EvaluateSettings = NO_TASKS) -> dict:
    """Accuracy on subjects by the member that does not learn from their fold (see `evaluation.evaluate`); `tasks`: what else is asked.

    Raises UserError where no subject is in a fold, the model was fitted in memory, or the label is not one.
    """
    from mmimpute.evaluation import evaluate, most_records
    from mmimpute.tasks.asking import ask, check_label, people_of

    model = registry.load(place)
    marginals = registry.marginals(model.url)
    beside = [settings.label] if settings.label else []
    check_label(model.schema, settings.label)
    members = model.module.config.members
    with runtime.cluster(cluster):
        most = most_records(model.schema.width)
        asked = ingest.judges(found.url, found.shards, model.schema, lambda place: held_out(place, members), most, beside)
    if not len(asked.x):
        raise UserError(f"{found.url}: no record that no part of the model has seen among {found.rows}; give more records")
    accuracy = evaluate(model, asked.x, fold(asked.place, members), marginals)
    if not settings.tasks:
        return accuracy
    label = asked.beside[settings.label] if settings.label else None
    tasks = ask(people_of(model, asked.x, asked.place, label, settings.label), settings.tasks)
    return accuracy | {"settings": settings.model_dump(mode="json"), "tasks": tasks}


def check_drift(
    url: str, shards: list[Shard], place: str, settings: DriftSettings, cluster: ClusterSettings, on_shard: Progress = ignore
) -> dict:
    """A drop of new shards beside the data that a model was fitted on: what `drift.compare` returns, and the model and set_aside.

    Only these shards are read. Values that a kind or the levels do not allow are counted, not set aside.
    Raises UserError where no shard fits the model, or a model has no reference; DataError where none is good inside.
    """
    from mmimpute.drift import compare
    from mmimpute.scoring import score_drop

    kept = registry.read_record(place, "reference")
    if kept is None:
        raise UserError(f"{place}: no reference.json to compare with; fit the model anew with this version of mmimpute")
    model = registry.load(place)
    found = survey_of(url, shards, model.schema)
    report = lambda done: on_shard({"profiled": done, "of": len(found.shards)})  # noqa: E731
    with runtime.cluster(cluster):
        seen, bad = ingest.profile(url, found.shards, model.schema, found.rows, report, strict=False)
    record = compare(model.schema, kept, seen, score_drop(model.module, model.schema, seen), settings)
    return record | {"model": place, "shards": len(shards), "set_aside": found.set_aside | bad}


def impute_table(
    found: Survey, place: str, output: str, settings: ImputeSettings, cluster: ClusterSettings, on_shard: Progress = ignore
) -> dict:
    """Imputes the shards that have no enriched version under this model and these settings yet.

    Returns {shards, done_before, rows, retries, seconds: {read, model, write, all}, set_aside, metrics (URL of the record of
    every shard, None where nothing was to do)}; commits nothing. Raises UserError where the model is damaged.
    """
    began = time.perf_counter()
    if settings.head:
        heads.check(settings.head, place)
    todo = table.outstanding(output, expected_outputs(found, place, settings))
    seconds = dict.fromkeys((*PHASES, "all"), 0.0)
    done = {"shards": len(found.shards), "done_before": len(found.shards) - len(todo), "rows": 0, "retries": 0, "seconds": seconds}
    found_bad, written = {}, None
    if todo:
        registry.load(place)  # of a damaged model, or one of another version, Ray would start workers for ever
        with runtime.cluster(cluster), closing(metrics.Record()) as record:
            for number, status in enumerate(impute_shards(place, found.url, todo, output, settings, cluster), 1):
                if status["error"]:
                    found_bad[status["shard"]] = status["error"]
                done["rows"] += status["rows"]
                done["retries"] += status["tries"] - 1
                for phase in PHASES:
                    seconds[phase] += status["seconds"][phase]
                record.add(status)
                on_shard({"imputed": number, "of": len(todo), "rows": done["rows"], "set_aside": len(found_bad)})
            seconds["all"] = time.perf_counter() - began
            run = done | lineage(found, place, settings) | {"set_aside": len(found_bad)}
            written = record.publish(storage.join(output, "_runs"), run)
    return done | {"set_aside": found.set_aside | found_bad, "metrics": written}


def expected_outputs(found: Survey, place: str, settings: ImputeSettings) -> dict[str, Shard]:
    """Key of the enriched version -> input shard."""
    return table.expected(found.shards, registry.digest_of(place), settings_digest(settings))


def lineage(found: Survey, place: str, settings: ImputeSettings) -> dict:
    """What a run's outputs come from. inputs: {shards: URL, number, digest of their names and ETags}; each output names its own."""
    inputs = {"shards": found.url, "number": len(found.shards), "digest": found.fingerprint}
    digests = {"model_digest": registry.digest_of(place), "settings_digest": settings_digest(settings)}
    return {"version": mmimpute.__version__, "model": place, "inputs": inputs, "settings": settings.model_dump(mode="json")} | digests


def commit_table(
    found: Survey, place: str, output: str, settings: ImputeSettings, prune: bool = False, imputed: dict = ALL_IMPUTED
) -> dict:
    """Makes what is published for these shards the table, in one commit. Returns {table, version, added, removed, counts, set_aside}.

    prune: what was made from inputs that are no longer listed leaves the table. imputed: what `impute_table` returned.
    Raises UserError where an enriched shard is not there that was; SetAside where every shard was set aside.
    """
    expected = expected_outputs(found, place, settings)
    wanted = [o for o in table.published(output) if o.key in expected]
    aside, there = imputed["set_aside"], {o.key for o in wanted}
    if gone := sum(key not in there and shard.key not in aside for key, shard in expected.items()):
        raise UserError(f"{output}: {gone} enriched shards are gone since they were published, by a vacuum perhaps; run again")
    if not wanted:
        raise SetAside(aside, "none is left to impute")
    run = imputed["metrics"] and imputed["metrics"].rsplit("/", 1)[1]
    told = lineage(found, place, settings) | {"run": run}
    done = table.commit(output, wanted, told, _gone(found.url, output) if prune else ())
    return {"table": output, **done._asdict()}


def _gone(shards: str, output: str) -> set[str]:
    """Sources of the table whose input is no longer listed."""
    # The table first: an input that another run has committed by then is in the listing.
    sources = {table.source_of(key) for key in table.table_state(output).keys}
    return sources - {table.source(s.key) for s in list_shards(shards)}


def impute_cohort(
    model: str,
    shards: str,
    output: str,
    settings: ImputeSettings,
    cluster: ClusterSettings,
    on_shard: Progress = ignore,
    prune: bool = False,
) -> dict:
    """Listing, imputation and commit in one: what `mmimpute impute` does. Raises UserError where no shard fits the model."""
    place = registry.locate(model)
    found = listed_for(shards, registry.describe(place).cohort)
    imputed = impute_table(found, place, output, settings, cluster, on_shard)
    committed = commit_table(found, place, output, settings, prune, imputed)
    return imputed | {"committed": committed, "set_aside": imputed["set_aside"] | committed["set_aside"]}


def finetune_head(model: str, shards: str, settings: FinetuneSettings, cluster: ClusterSettings) -> dict:
    """Fits a head to the model's z0 on the labelled records of these shards.

    Returns {head (its URL), model, rows (labelled records), targets, set_aside}. Raises UserError where a target is no class, is an
    input of the model, or where too few records have a label.
    """
    from mmimpute import finetuning

    place = registry.locate(model)
    loaded = registry.load(place)
    finetuning.check_targets(loaded, settings)
    found = survey_for(shards, loaded.schema)
    with runtime.cluster(cluster):
        asked = ingest.labelled(found.url, found.shards, loaded.schema, list(settings.target), settings.most)
    if not len(asked.x):
        raise UserError(f"{shards}: no record has a label in {', '.join(settings.target)}")
    head, targets = finetuning.fit(loaded, asked.x, asked.place, asked.beside, settings)
    url = heads.save(place.rsplit("/", 1)[0], loaded.digest, head, targets, settings)
    told = [t.model_dump() for t in targets]
    return {"head": url, "model": place, "rows": len(asked.x), "targets": told, "set_aside": found.set_aside}


def classify_cohort(
    head: str,
    shards: str,
    output: str,
    settings: ImputeSettings,
    cluster: ClusterSettings,
    on_shard: Progress = ignore,
    prune: bool = False,
) -> dict:
    """What `impute_cohort` does, by the head's model and with the head's probabilities beside what is imputed."""
    chosen = settings.model_copy(update={"head": heads.locate(head).url})
    return impute_cohort(heads.model_of(head), shards, output, chosen, cluster, on_shard, prune)


def verify_table(model: str, shards: str, output: str, cluster: ClusterSettings, on_shard: Progress = ignore) -> dict:
    """Holds every object of the table's current version against its input, by the schema of the model.

    Returns {version, shards, rows, problems: {shard: [what is wrong]}}. Raises UserError where there is no model, no shard or no table.
    """
    from mmimpute.cluster.verify import verify_shards
    from mmimpute.verifying import pairs_of

    schema = registry.describe(model).cohort
    state = table.committed(output)
    pairs, problems = pairs_of(list_shards(shards), state.keys, table.published(output))
    rows = 0
    if pairs:
        with runtime.cluster(cluster):
            for number, status in enumerate(verify_shards(schema, shards, pairs, output), 1):
                rows += status["rows"]
                if status["problems"]:
                    problems[status["shard"]] = status["problems"]
                on_shard({"verified": number, "of": len(pairs), "rows": rows})
    return {"version": state.version, "shards": len(pairs), "rows": rows, "problems": dict(sorted(problems.items()))}


def alert_table(model: str, output: str, rules: AlertRules, to: str, on_shard: Progress = ignore) -> dict:
    """Holds the rules against the table's current version and makes the outreach lists the table at `to`.

    A list is written once per enriched object, model and rules. Returns {version (of the enriched table), shards, new,
    rows (looked at), counts: {rule: people}}. Raises UserError: no model or table, a rule that does not fit, no place of its own;
    SetAside where a list's columns are not those of the lists before.
    """
    from mmimpute import alerts

    alerts.check_apart(output, to)
    loaded, state = registry.load(model), table.committed(output)
    objects = [o for o in table.published(output) if o.key in state.keys]
    # What an enriched object holds follows from its key; an ETag on a disk changes with the time of writing.
    wanted = {table.output_key(Shard(o.key, "", 0), loaded.digest, alerts.rules_digest(rules)): o for o in objects}
    done = {o.key for o in table.published(to)}
    todo, rows = [(key, o) for key, o in wanted.items() if key not in done], 0
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        listing = [pool.submit(alerts.list_shard, loaded, rules, output, shard, to, key) for key, shard in todo]
        for number, status in enumerate(as_completed(listing), 1):
            rows += status.result()["rows"]
            on_shard({"listed": number, "of": len(todo), "rows": rows})
        lists = [o for o in table.published(to) if o.key in wanted]
        counts = sum(map(Counter, pool.map(lambda o: alerts.people_listed(to, o), lists)), Counter())
    gone = {table.source_of(key) for key in table.table_state(to).keys} - {table.source(o.key) for o in objects}
    lineage = {"version": mmimpute.__version__, "model": loaded.url, "enriched": output, "rules": alerts.rules_digest(rules)}
    if aside := table.commit(to, lists, lineage, gone).set_aside:
        raise SetAside(aside)
    return {
        "version": state.version,
        "shards": len(objects),
        "new": len(todo),
        "rows": rows,
        "counts": {name: counts[name] for name in rules.rules},
    }


def generate_cohort(model: str, output: str, n: int, seed: int, cluster: ClusterSettings, on_shard: Progress = ignore) -> dict:
    """Writes n synthetic records as shards. Returns {shards, rows}. Raises UserError where the model is damaged."""
    from mmimpute.cluster.generate import generate_shards

    place = registry.load(model).url
    sizes = [min(SHARD_ROWS, n - start) for start in range(0, n, SHARD_ROWS)]
    rows = 0
    with runtime.cluster(cluster):
        for number, status in enumerate(generate_shards(place, output, sizes, seed, cluster), 1):
            rows += status["rows"]
            on_shard({"generated": number, "of": len(sizes), "rows": rows})
    return {"shards": len(sizes), "rows": rows}


def retrieve_table(model: str, shards: str, query: str, among: str, k: int, output: str, cluster: ClusterSettings) -> dict:
    """Writes who was found for whom as one Parquet table, by the hash of what it is made from. Returns what `search.retrieve` counts,

    table (its URL) and set_aside. Raises UserError for unknown modalities, a damaged model and as `search.retrieve`.
    """
    from mmimpute.cluster.retrieve import retrieve_among

    loaded = registry.load(model)
    place, schema = loaded.url, loaded.schema
    names = [m.name for m in schema.modalities]
    for option, name in (("--query", query), ("--among", among)):
        if name not in names:
            raise UserError(f"{option}: no modality {name!r}; the model has {', '.join(names)}")
    if query == among:
        raise UserError(f"--among: give another modality than {query!r}")
    found = listed_for(shards, schema)
    name = f"retrieved-{table.digest(found.fingerprint, registry.digest_of(place), query, among, str(k))}.parquet"
    with runtime.cluster(cluster):
        told = retrieve_among(place, shards, found.shards, (names.index(query), names.index(among)), k, output, name, cluster)
    if "mend" in told:
        raise UserError(f"{shards}: {told['mend']}")
    return told | {"table": storage.join(output, name), "set_aside": found.set_aside | told["set_aside"]}
