"""What a report may show of the tasks beside imputation (see `tasks`): as in `disclosure`, no group of fewer than ten people."""

from typing import Any

from mmimpute.report.disclosure import SMALLEST_GROUP, number, people

SAMPLES = {"halves": "real people", "imputed": "drawn given the rest", "generated": "synthetic"}
DEPTHS = ("1", "5", "10")


def view(tasks: dict) -> dict[str, Any]:
    """Per task what the template and the figures see; tasks that were not asked are None."""
    parts = {"coherence": _coherence, "quality": _quality, "likelihood": _likelihood, "probe": _probe, "retrieval": _retrieval}
    return {name: part(tasks[name]) if tasks.get(name) else None for name, part in parts.items()}


def _enough(entry: dict | None) -> bool:
    return entry is not None and entry["rows"] >= SMALLEST_GROUP


def _numbers(entry: dict, names: tuple[str, ...]) -> dict:
    return {name: number(entry[name]) for name in names}


def _coherence(found: dict) -> dict:
    names = ("commonest", "accuracy", "coherence", "auroc", "auroc_drawn")
    shown = {str(n): e for n, e in found["conditional"].items() if _enough(e)}
    joint = found["joint"] if _enough(found["joint"]) else None
    return {
        "conditional": [{"name": n, "rows": people(e["rows"])} | _numbers(e, names) for n, e in shown.items()],
        "joint": joint and {"rows": people(joint["rows"])} | _numbers(joint, ("real", "synthetic", "chance")),
    }


def _quality(found: dict) -> list[dict]:
    return [
        {"name": str(name), "rows": people(entry["rows"]), "samples": label} | _numbers(entry[key], ("frechet", "density", "coverage"))
        for name, entry in found.items()
        if _enough(entry)
        for key, label in SAMPLES.items()
        if entry[key]
    ]


def _likelihood(found: dict) -> dict | None:
    if not _enough(found):
        return None
    rows = {"everything observed": found} | {f"{n}, given the rest": e for n, e in found["conditional"].items() if _enough(e)}
    told = [
        {"name": name, "rows": people(e["rows"])} | {k: _numbers(e[k], ("mean", "std_error")) for k in ("nats", "per_value")}
        for name, e in rows.items()
    ]
    return {"samples": int(found["samples"]), "effective": number(found["effective"]), "elbo": number(found["elbo"]["mean"]), "told": told}


def _probe(found: list[dict]) -> list[dict]:
    return [
        {"name": condition(entry), "rows": people(entry["rows"])}
        | {name: {m: entry[name][m] and [number(v) for v in entry[name][m]] for m in ("auroc", "accuracy")} for name in ("z0", "raw")}
        for entry in found
        if _enough(entry)
    ]


def condition(entry: dict) -> str:
    """What of a record a probe sees."""
    if not entry["hidden"]:
        return "everything"
    return f"only {entry['kept'][0]}" if len(entry["kept"]) == 1 else f"without {', '.join(entry['hidden'])}"


def _retrieval(found: list[dict]) -> list[dict]:
    """The pairs that are found best, relative to chance, first."""
    shown = [
        {"query": str(e["query"]), "among": str(e["among"]), "rows": people(e["rows"]), "size": people(round(e["size"]))}
        | {"median_rank": number(e["median_rank"])}
        | {name: {k: number(e[name][k]) for k in DEPTHS} for name in ("recall", "chance")}
        for e in found
        if _enough(e)
    ]
    return sorted(shown, key=lambda e: -e["recall"]["10"] / e["chance"]["10"])
