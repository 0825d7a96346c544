"""The model card: what a model was made from, how good it is and for whom, what it is for, and why it was promoted or kept.

`card.json` holds the numbers and `card.md` the page, both beside the model. Groups under SMALLEST_GROUP people are left out, and so
are the ten earliest and the ten latest of the dates that bound the data window, which is told by the month.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np

from mmimpute import registry
from mmimpute.data import storage
from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.gate import Measured

MOST_GROUPS = 8  # numbers of more distinct values are cut into bands
BANDS = (0.25, 0.5, 0.75)  # quantiles at which
MONTH = len("2026-11")
INTENDED_USE = (
    "Completes records of people like those of its training data, for research, and for models that were validated on completed data.",
    "An imputed value says what is typical of people with the same record elsewhere. It is no measurement: it must not be shown as one, "
    "and nobody's care may be decided on it alone.",
)
LIMITS = (
    "Values that are missing for a reason which the record does not show are imputed as if that reason did not exist.",
    "Intervals hold as many values as they say on average over a modality, not for each person, feature or group.",
    "Groups that are rare in the training data are imputed towards the majority: see the subgroups above.",
    "The accuracy is that of one member on people it had not seen, under the conditions of the data window; it says nothing of later ones.",
)


def window(dates: np.ndarray) -> list[str] | None:
    """First and last month of ISO dates as text, without the ten at either end; None for too few, or what are no dates."""
    known = np.sort([d for d in dates if d])
    if len(known) < 2 * SMALLEST_GROUP or not all(re.match(r"\d{4}-\d\d", d) for d in (known[0], known[-1])):
        return None
    return [str(d)[:MONTH] for d in (known[SMALLEST_GROUP - 1], known[-SMALLEST_GROUP])]


def groups(values: np.ndarray) -> dict[str, np.ndarray]:
    """As `levels`, without small groups."""
    found = levels(values)
    kept = told({level: int(rows.sum()) for level, rows in found.items()}, len(values))
    return {level: found[level] for level in kept}


def levels(values: np.ndarray) -> dict[str, np.ndarray]:
    """The people of each level of a column of text, or of each band of numbers; nobody where it is empty."""
    known = values != ""
    numbers = _numbers(values)
    if numbers is None or len(np.unique(numbers[known])) <= MOST_GROUPS:
        return {str(level): values == level for level in np.unique(values[known])}
    return dict(_bands(numbers))


def told(people: Mapping[str, int], total: int) -> list[str]:
    """Which groups are told: those of SMALLEST_GROUP people or more, unless the total less all of them leaves a smaller one."""
    kept = sorted((g for g, n in people.items() if n >= SMALLEST_GROUP), key=people.get, reverse=True)
    while kept and 0 < total - sum(people[g] for g in kept) < SMALLEST_GROUP:
        kept.pop()
    return [g for g in people if g in kept]


def _numbers(values: np.ndarray) -> np.ndarray | None:
    """N, NaN where a text is empty; None where one is no number."""
    try:
        return np.array([float(v) if v else np.nan for v in values])
    except ValueError:
        return None


def _bands(numbers: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Quarters of the people, the edges rounded to two digits so that none is anybody's value."""
    edges = sorted({float(f"{q:.2g}") for q in np.nanquantile(numbers, BANDS)})
    for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
        name = f"under {high:g}" if low == -np.inf else f"{low:g} and over" if high == np.inf else f"{low:g} to under {high:g}"
        yield name, (numbers >= low) & (numbers < high)


def scores(measured: Measured, rows: np.ndarray | slice = slice(None)) -> dict | None:
    """Skill, nats and coverage of some people; None where fewer than SMALLEST_GROUP of them hold the modality."""
    loss, marginal = measured.loss[rows], measured.marginal[rows]
    held = ~np.isnan(loss)
    if held.sum() < SMALLEST_GROUP:
        return None
    mean = lambda t: float(np.nanmean(t)) if not np.isnan(t).all() else None  # noqa: E731
    base = marginal[held].mean()
    skill = float(1 - loss[held].mean() / base) if base > 0 else None
    return {"people": int(held.sum()), "skill": skill, "nats": mean(measured.nats[rows]), "cover90": mean(measured.covered[rows])}


def numbers(measured: Mapping[str, Measured], beside: Mapping[str, np.ndarray], outcomes: Mapping[str, np.ndarray]) -> dict:
    """What was measured, over all and by subgroup. beside: subgroup columns as text; outcomes: losses of the regressions."""
    overall = {name: s | {"ece": m.ece} for name, m in measured.items() if (s := scores(m))}
    by_group = {column: _by_group(measured, groups(values), overall) for column, values in beside.items()}
    downstream = {name: {"people": int((~np.isnan(o)).sum()), "skill": float(1 - np.nanmean(o))} for name, o in outcomes.items()}
    return {"modalities": overall, "subgroups": by_group, "outcomes": downstream}


def _by_group(measured: Mapping[str, Measured], levels: Mapping[str, np.ndarray], overall: Mapping[str, dict]) -> dict:
    found = {level: {"people": int(rows.sum()), "modalities": {}} for level, rows in levels.items()}
    for name in overall:
        each = {level: s for level, rows in levels.items() if (s := scores(measured[name], rows))}
        for level in told({level: s["people"] for level, s in each.items()}, overall[name]["people"]):
            found[level]["modalities"][name] = each[level]
    return found


def facts(model: registry.Model) -> dict:
    """What a fit left beside its model: {digest, version, fitted, rows, shards, set_aside, profile}."""
    fitted, profile, aside = (registry.read_record(model.url, name) for name in ("fitted", "profile", "set_aside"))
    modalities = {
        n: {"features": prod(m.get("shape", [len(m["features"])])), "present": m["present"]} for n, m in profile["modalities"].items()
    }
    counts = {"rows": fitted["rows"], "shards": fitted["shards"], "set_aside": len(aside), "profile": modalities}
    return {"digest": model.digest, "version": model.file.version, "fitted": fitted["at"]} | counts


def write(place: str, facts: dict) -> None:
    """Both files. facts: those of `facts`, and people, window, measured (see `numbers`) and decision."""
    registry.write_record(place, "card", facts)
    storage.write(place, "card.md", render(facts).encode())


def render(facts: dict) -> str:
    """The page, in Markdown."""
    measured, reason = facts["measured"], facts["decision"]["reason"]
    parts = [f"# Model {facts['digest'][:12]}", f"**{reason[:1].upper()}{reason[1:]}.**", "## Data", _table(("", ""), _data(facts))]
    parts += ["## Modalities", "Each hidden in turn from people that the asked member had not seen. The column mean has skill 0."]
    parts += [_table(("modality", "features", "records", *SCORES, "ECE"), _modalities(facts))]
    if measured["outcomes"]:
        parts += ["## Downstream", "Logistic regressions on completed records, cross-fitted. Skill 0: no better than the share of people."]
        parts += [_table(("outcome", "people", "skill"), _outcomes(measured["outcomes"]))]
    for column, levels in measured["subgroups"].items():
        parts += [f"## By {_escaped(column)}", _table(("group", "people", "modality", *SCORES), _subgroup(levels))]
    parts += ["## Intended use", _list(INTENDED_USE), "## Limits", _list(LIMITS)]
    if "overall" in facts["decision"]:
        parts += ["## Gate", *_gate(facts["decision"])]
    return "\n\n".join(parts) + "\n"


SCORES = ("people asked", "skill", "log-likelihood, nats a value", "90% intervals hold")
KEYS = ("people", "skill", "nats", "cover90")


def _data(facts: dict) -> list[Sequence[str]]:
    first_last = " to ".join(facts["window"]) if facts["window"] else "not known"
    return [
        ("shards", f"{facts['shards']:,} ({facts['set_aside']:,} set aside)"),
        ("records", f"{facts['rows']:,}"),
        ("data window", first_last),
        ("fitted", f"{facts['fitted']}, by mmimpute {facts['version']}"),
        ("people asked about", f"{facts['people']:,}"),
    ]


def _modalities(facts: dict) -> Iterator[Sequence[str]]:
    for name, entry in facts["profile"].items():
        found = facts["measured"]["modalities"].get(name, {})
        records = f"{entry['present']:,}" if entry["present"] >= SMALLEST_GROUP else f"<{SMALLEST_GROUP}"
        yield name, f"{entry['features']:,}", records, *_cells(found, (*KEYS, "ece"))


def _outcomes(found: dict) -> Iterator[Sequence[str]]:
    for name, entry in found.items():
        yield name, *_cells(entry, ("people", "skill"))


def _subgroup(levels: dict) -> Iterator[Sequence[str]]:
    for level, group in levels.items():
        for name, found in group["modalities"].items():
            yield level, f"{group['people']:,}", name, *_cells(found, KEYS)


def _gate(decision: dict) -> Iterator[str]:
    yield (
        f"Held against the champion {decision['champion'][:12]} on {decision['subjects']:,} people that neither had seen. Gain: of skill. "
        "Nats a value and calibration errors: the champion's, then this model's."
    )
    yield _table(GATE, gate_rows(decision))


GATE = ("", "gain", "interval", "nats a value", "calibration errors")


def gate_rows(decision: dict) -> Iterator[Sequence[str]]:
    """A decision as rows of text, as GATE names them; none where nothing was compared."""
    if "overall" not in decision:
        return
    for name, e in [("overall", decision["overall"]), *decision["modalities"].items(), *decision["outcomes"].items()]:
        nats = " → ".join(f"{v:.3f}" for v in e.get("nats", ()) if v is not None)
        errors = "; ".join(f"{what} {before:.3f} → {after:.3f}" for what, (before, after) in e.get("calibration", {}).items())
        yield name, f"{e['gain']:+.4f}", f"{e['low']:+.4f} to {e['high']:+.4f}", nats or "–", errors or "–"


def _cells(found: dict, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        value = found.get(key)
        yield "–" if value is None else f"{value:,}" if key == "people" else f"{value:.1%}" if key == "cover90" else f"{value:.3f}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(_escaped, row)) + " |" for row in rows)])


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _escaped(text: str) -> str:
    """Names of columns and levels are whatever the data hold: on one line, and no markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&~$])", r"\\\1", " ".join(text.split()))
