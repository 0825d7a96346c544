"""Retraining with a gate: a challenger is fitted, held against the champion, and takes its place or is kept beside it.

fit -> judge -> settle. Each finds what an earlier try has left: a model that was fitted on just this is not fitted again, and a decision
against this champion by these settings is not made again. Promotion is one atomic write of the alias (see `registry`).
"""

from mmimpute import card, registry
from mmimpute import gate as gates
from mmimpute.cluster import ingest, runtime
from mmimpute.data import storage
from mmimpute.data.split import held_out
from mmimpute.errors import UserError
from mmimpute.evaluation import most_records
from mmimpute.jobs import Progress, fingerprint, fit_model, ignore, known_model
from mmimpute.planning import Survey, outcome_columns
from mmimpute.spec import ClusterSettings, CohortSpec, FitSettings, GateSettings

STANDS = "the champion still stands"


def standing_champion(home: str, fitted_on: str, gate: GateSettings | None) -> str | None:
    """The champion's digest, if it was fitted on just this, or if what was fitted on just this was judged by these settings and kept.

    gate: None: a challenger that was kept counts for nothing.
    """
    champion = registry.champion(home)
    if champion is None or registry.describe(home).fitted_on == fitted_on:
        return champion
    challenger = registry.fitted_on(home, fitted_on) if gate else None
    decision = challenger and registry.read_record(storage.join(home, challenger), "gate")
    kept = decision and not decision["promoted"] and (decision["champion"], decision["settings"]) == (champion, gate.model_dump())
    return champion if kept else None


def judge_model(found: Survey, spec: CohortSpec, home: str, name: str, gate: GateSettings | None, cluster: ClusterSettings) -> dict:
    """Holds a model against the champion, on people that neither has seen, and leaves the decision and the model card beside it.

    gate: None: no comparison. Returns what `gate.decide` does, with the champion and the settings.
    """
    alias, place = registry.alias(home), storage.join(home, name)
    champion = alias and alias.digest
    terms = {"champion": champion, "settings": gate and gate.model_dump()}
    decision, withdrawn = registry.read_record(place, "gate"), bool(gate and alias and name in alias.withdrawn)
    if decision and (champion == name or (decision | terms == decision and not (withdrawn and decision["promoted"]))):
        return decision
    against = storage.join(home, champion) if gate and champion else None
    with runtime.cluster(cluster):
        facts, verdict = _held_against(found, spec, place, against, gate or GateSettings())
    if against is None:
        verdict = {"promoted": True, "reason": "promoted: the first model" if gate else "promoted by hand, without a comparison"}
    elif withdrawn:
        verdict |= {"promoted": False, "reason": "kept: it was rolled back; new data make another challenger"}
    decision = verdict | terms
    card.write(place, facts | {"decision": decision})
    registry.write_record(place, "gate", decision)
    return decision


def _held_against(found: Survey, spec: CohortSpec, place: str, champion: str | None, gate: GateSettings) -> tuple[dict, dict]:
    """What the card tells but for the decision, and the decision; empty where there is no champion."""
    models = [registry.load(url) for url in (place, champion) if url]
    outcomes, times = outcome_columns(found, spec), [spec.timestamp] if spec.timestamp else []
    schema, members = models[0].schema, [m.module.config.members for m in models]
    chosen = lambda place: held_out(place, *members)  # noqa: E731
    asked = ingest.judges(found.url, found.shards, schema, chosen, most_records(schema.width), {*outcomes, *spec.subgroups, *times})
    binary = gates.binary_outcomes({c: asked.beside[c] for c in outcomes})
    if champion:
        verdict, told = gates.compare(models[1], models[0], asked.x, asked.place, binary, gate)
    else:
        told = gates.tell(models[0], asked.x, asked.place, binary, registry.marginals(models[0].url), gate.seed)
        verdict = {}
    numbers = card.numbers(told.modalities, {c: asked.beside[c] for c in spec.subgroups}, told.outcomes)
    window = card.window(asked.beside[spec.timestamp]) if spec.timestamp else None
    return card.facts(models[0]) | {"people": len(asked.x), "window": window, "measured": numbers}, verdict


def settle(home: str, fitted: dict, decision: dict) -> dict:
    """Promotes a challenger, or leaves the champion. Returns the record of the fit, but for digest and model: those of the champion.

    With it `promoted`, whether this call changed the champion, and the reason. Raises UserError where another champion came in between.
    """
    champion, reason, promoted = registry.champion(home), decision["reason"], False
    if champion == fitted["digest"]:
        reason = STANDS
    elif decision["promoted"]:
        if champion != decision["champion"]:
            raise UserError(f"{home}: the champion changed while a challenger was judged; run again")
        registry.promote(home, fitted["digest"])
        champion, promoted = fitted["digest"], True
    return fitted | {"digest": champion, "model": storage.join(home, champion), "promoted": promoted, "reason": reason}


def renew(
    found: Survey,
    spec: CohortSpec,
    home: str,
    settings: FitSettings,
    gate: GateSettings | None,
    cluster: ClusterSettings,
    on_progress: Progress = ignore,
) -> dict:
    """The champion for these shards: the one that stands, or a challenger that passed the gate, or else the one that was there.

    gate: None: what is fitted becomes champion. Returns {digest, model, trained, set_aside, seconds, reason}.
    """
    fitted_on = fingerprint(found, settings)
    name = standing_champion(home, fitted_on, gate)
    if name:
        return known_model(home, name, fitted_on) | {"reason": STANDS}
    with runtime.cluster(cluster):
        fitted = fit_model(found, home, settings, cluster, on_progress)
        return settle(home, fitted, judge_model(found, spec, home, fitted["digest"], gate, cluster))
