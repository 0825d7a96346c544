"""What a report may show: aggregates, and no group of fewer than ten people.

`view` turns the facts of a run into what the template and the figures see, and they see nothing else. Its rules:

- a count of 1 to 9 becomes "<10", and every statistic of that group is dropped with it;
- larger counts of people, but for the total, are rounded to ten, so that no small group follows by subtraction;
- a binary rate that stands for fewer than ten people of either kind is not shown;
- histogram and reliability bins under ten are dropped, and an axis ends where the last shown bin ends.
"""

import math
from collections.abc import Iterable
from typing import Any

SMALLEST_GROUP = 10
FEW = f"<{SMALLEST_GROUP}"
METRICS = ("skill", "r2", "auroc", "cover90", "interval90", "ece")
EXPERTS = ("vae", "additive", "gaussian")


def view(run: dict) -> dict[str, Any]:
    """The facts of `run` that may be shown, complete: what `run` lacks is None or empty."""
    shards = run.get("shards") or {}
    return {
        "title": str(run.get("title") or "Imputation run"),
        **{name: _text(run.get(name)) for name in ("started", "version", "model_digest", "model_url", "table_url", "table_version")},
        "seconds": {str(name): number(value) or 0.0 for name, value in (run.get("seconds") or {}).items()},
        "shards": {
            **{name: int(shards.get(name) or 0) for name in ("total", "new", "already_done")},
            "set_aside": [{"shard": str(bad.get("shard")), "error": str(bad.get("error"))} for bad in shards.get("set_aside") or ()],
        },
        "rows": total(run.get("rows")),
        "from_prior": people(run.get("from_prior")),
        "alerts": [_alert(alert) for alert in run.get("alerts") or ()],
        "imputed": [_imputed(name, counts) for name, counts in (run.get("imputed") or {}).items()],
        "profile": _profile(run["profile"]) if run.get("profile") else None,
        "history": [{name: number(value) for name, value in epoch.items()} for epoch in run.get("history") or ()],
        "evaluation": _evaluation(run["evaluation"]) if run.get("evaluation") else None,
        "heads": [_head(head) for head in run.get("heads") or ()],
        "drift": _drift(run["drift"]) if (run.get("drift") or {}).get("judged") else None,
    }


def few(n: int | None) -> bool:
    return n is not None and 0 < n < SMALLEST_GROUP


def people(n: int | None) -> int | str | None:
    """A count of people as it may be shown: 0, "<10", or rounded to ten."""
    if n is None:
        return None
    if few(n):
        return FEW
    return (int(n) + SMALLEST_GROUP // 2) // SMALLEST_GROUP * SMALLEST_GROUP


def total(n: int | None) -> int | str | None:
    return n if n is None else FEW if few(n) else int(n)


def number(x: Any) -> float | None:
    """A finite number, or None: a missing or undefined statistic."""
    return float(x) if isinstance(x, int | float) and math.isfinite(x) else None


def _text(x: Any) -> str | None:
    return None if x is None else str(x)


def _alert(alert: dict) -> dict:
    count = alert.get("people")
    return {"rule": str(alert.get("rule")), "message": str(alert.get("message") or ""), "people": FEW if count == FEW else people(count)}


def _head(head: dict) -> dict:
    """As `heads.Target` has it: its classes and the points of its curve stand for enough people."""
    curve = [(people(labelled), number(auroc)) for labelled, auroc in head["curve"]]
    told = {"name": str(head["column"]), "classes": len(head["levels"]), "people": people(head["people"])}
    return told | {"auroc": number(head["auroc"]), "curve": curve}


def _imputed(name: str, counts: dict) -> dict:
    rows = counts.get("rows")
    return {"name": name, "rows": people(rows), "values": FEW if few(rows) else people(counts.get("values"))}


def _drift(drift: dict) -> dict:
    """As `drift.compare` made it: nothing in there stands for a small group."""
    features = [
        {"name": f"{f['modality']}: {f['name']}", "psi": number(f["psi"]), "noise": number(f["noise"])}
        for f in drift["features"]
        if f["psi"] is not None
    ]
    modalities = [
        {"name": str(name), "score": m["score"] and number(m["score"]["shift"]), "missing": m["missing"] and m["missing"]["drop"]}
        | {"noise": m["score"] and number(m["score"]["noise"]), "training": m["missing"] and m["missing"]["training"]}
        for name, m in drift["modalities"].items()
    ]
    return {
        "drifted": bool(drift["drifted"]),
        "reasons": [str(reason) for reason in drift["reasons"]],
        "rows": total(drift["rows"]),
        "shards": drift["shards"],
        "features": sorted(features, key=lambda f: -f["psi"]),
        "modalities": modalities,
        "settings": {name: float(value) for name, value in drift["settings"].items()},
    }


# --- profile ---------------------------------------------------------------------------------------------------------------------------


def _profile(profile: dict) -> dict:
    modalities = profile.get("modalities") or {}
    rows = profile.get("rows") or 0
    return {
        "rows": total(rows),
        "modalities": [
            {
                "name": name,
                "present": people(modality.get("present")),
                "share": share(modality.get("present"), rows),
                "features": [_feature(feature, modality.get("present")) for feature in modality.get("features") or ()],
            }
            for name, modality in modalities.items()
        ],
        "together": _together(profile.get("together") or []),
        "patterns": _patterns(profile.get("patterns") or [], rows),
    }


def share(n: int | None, of: int | None) -> float | None:
    """The share that a shown count makes up, from rounded counts; None where the count is hidden."""
    part, whole = people(n), people(of)
    if not isinstance(part, int) or not isinstance(whole, int) or not whole:
        return None
    return min(part / whole, 1.0)


def _feature(feature: dict, present: int | None) -> dict:
    observed = feature.get("observed")
    statistics = {name: number(feature.get(name)) for name in ("mean", "std", "low", "high")}
    hidden = not observed or few(observed)
    rate_note = _rare(statistics["mean"], observed) if feature.get("kind") == "binary" and not hidden else None
    if hidden or rate_note:
        statistics = dict.fromkeys(statistics)
    return {
        "name": str(feature.get("name")),
        "kind": str(feature.get("kind")),
        "log": bool(feature.get("log")) and not few(observed),
        "observed": people(observed),
        "share": share(observed, present),
        "note": rate_note,
        **statistics,
    }


def _rare(rate: float | None, n: int) -> str | None:
    """Why a binary rate may not be shown, or None when it may."""
    if rate is None:
        return None
    if few(round(rate * n)):
        return f"{FEW} ones"
    return f"{FEW} zeros" if few(round((1.0 - rate) * n)) else None


def _together(counts: list[list[int]]) -> list[list[dict]]:
    """Rows of {count, share of the row's modality}."""
    return [[{"count": people(cell), "share": share(cell, row[j])} for cell in row] for j, row in enumerate(counts)]


def _patterns(patterns: list[dict], of: int) -> dict:
    """Patterns of ten people or more, most frequent first, and how many rarer ones there are."""
    shown = sorted((p for p in patterns if p["rows"] >= SMALLEST_GROUP), key=lambda p: (-people(p["rows"]), p["present"]))
    return {
        "shown": [{"present": list(p["present"]), "rows": people(p["rows"]), "share": share(p["rows"], of)} for p in shown],
        "rare": sum(few(p["rows"]) for p in patterns),
    }


# --- evaluation ------------------------------------------------------------------------------------------------------------------------


def _evaluation(evaluation: dict) -> dict:
    modalities = [_accuracy(name, facts) for name, facts in (evaluation.get("modalities") or {}).items()]
    skills = [modality["skill"] for modality in modalities if modality["skill"] is not None]
    return {"rows": people(evaluation.get("rows")), "skill": sum(skills) / len(skills) if skills else None, "modalities": modalities}


def _accuracy(name: str, facts: dict) -> dict:
    rows = facts.get("rows") or 0
    hidden = rows < SMALLEST_GROUP
    if hidden:
        facts = {}
    features = [_scores(feature) for feature in facts.get("features") or ()]
    features.sort(key=lambda feature: -math.inf if feature["skill"] is None else feature["skill"], reverse=True)
    order = {feature["name"]: position for position, feature in enumerate(features) if not few_text(feature["n"])}
    distributions = [shown for d in facts.get("distributions") or () if d["name"] in order or not features if (shown := _distribution(d))]
    distributions.sort(key=lambda distribution: order.get(distribution["name"], 0))
    return {
        "name": name,
        "rows": people(rows),
        **{metric: number(facts.get(metric)) for metric in METRICS},
        "experts": {name: number((facts.get("experts") or {}).get(name)) for name in EXPERTS},
        "features": features,
        "calibration": _calibration(facts.get("calibration")),
        "reliability": _reliability(facts.get("reliability") or ()),
        "pit": merged(facts.get("pit")),
        "distributions": distributions,
    }


def few_text(shown: int | str | None) -> bool:
    return shown == FEW


def _scores(feature: dict) -> dict:
    n = feature.get("n") or 0
    scores = {metric: number(feature.get(metric)) if n >= SMALLEST_GROUP else None for metric in ("skill", "r2", "auroc")}
    return {"name": str(feature.get("name")), "kind": str(feature.get("kind")), "n": people(n), **scores}


def _calibration(calibration: dict | None) -> dict | None:
    if not calibration:
        return None
    pairs = zip(calibration["nominal"], calibration["observed"], strict=True)
    kept = [(nominal, observed) for nominal, observed in pairs if number(nominal) is not None and number(observed) is not None]
    return {"nominal": [pair[0] for pair in kept], "observed": [pair[1] for pair in kept]} if kept else None


def _reliability(bins: Iterable[dict]) -> list[dict]:
    """Bins of ten people or more in which neither outcome stands for one to nine people."""
    shown = []
    for bin in bins:
        predicted, observed, n = number(bin.get("predicted")), number(bin.get("observed")), bin.get("n") or 0
        if n >= SMALLEST_GROUP and predicted is not None and observed is not None and not _rare(observed, n):
            shown.append({"predicted": predicted, "observed": observed, "n": people(n)})
    return shown


def merged(counts: list[int] | None) -> list[int] | None:
    """A histogram over equal bins, neighbours merged until none holds one to nine people; None when that needs fewer than four bins."""
    while counts and any(few(n) for n in counts):
        if len(counts) % 2 or len(counts) < 8:
            return None
        counts = [counts[i] + counts[i + 1] for i in range(0, len(counts), 2)]
    return list(counts) if counts and sum(counts) else None


def _distribution(distribution: dict) -> dict | None:
    """Both histograms without their small bins, and without the edges beyond the outermost bin that is shown."""
    observed, imputed = ([n if n >= SMALLEST_GROUP else 0 for n in distribution[name]] for name in ("observed", "imputed"))
    used = [i for i, (a, b) in enumerate(zip(observed, imputed, strict=True)) if a or b]
    if not used or not any(observed):
        return None
    first, last = used[0], used[-1] + 1
    edges = distribution["edges"][first : last + 1]
    return {"name": str(distribution["name"]), "edges": edges, "observed": observed[first:last], "imputed": imputed[first:last]}
