"""From the facts of a run to one self-contained HTML page."""

import datetime
import functools
from typing import Any

import jinja2
from markupsafe import Markup

from mmimpute.report.disclosure import FEW, few_text, view
from mmimpute.report.tasks import SAMPLES
from mmimpute.report.tasks import view as tasks_view

MOST_PATTERNS = 20
MOST_ROWS = 200  # of a table of features
MOST_DISTRIBUTIONS = 6  # of a modality


def render(run: dict) -> str:
    """Return the page for `run`; parts that `run` lacks are left out, groups of fewer than ten people are not shown."""
    shown = view(run)
    tasks = tasks_view((run.get("evaluation") or {}).get("tasks") or {})
    return _template().render(run=shown, tasks=tasks, draw=_Drawing(), overall=_overall(shown), most=MOST_ROWS, most_patterns=MOST_PATTERNS)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmimpute.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=count, decimal=decimal, percent=percent, duration=duration, moment=moment, url=url)
    return environment.get_template("template.html")


def _overall(shown: dict) -> dict[str, Any]:
    """The headline numbers that are not facts of the run themselves."""
    values = [part["values"] for part in shown["imputed"] if part["values"] is not None]
    known = [n for n in values if not few_text(n)]
    return {"seconds": sum(shown["seconds"].values()), "values": sum(known) if known else FEW if values else None}


class _Drawing:
    """The template's access to figures: each method returns an SVG element, numbered so that no two share an id."""

    def __init__(self):
        self.drawn = 0

    def patterns(self, profile: dict) -> Markup:
        from mmimpute.report import figures

        shown, names = profile["patterns"]["shown"][:MOST_PATTERNS], [m["name"] for m in profile["modalities"]]
        told = (f"{count(p['rows'])} people ({percent(p['share'])}) have {', '.join(p['present']) or 'nothing'}" for p in shown)
        return self._svg(figures.patterns(shown, names), "Which modalities come together: " + "; ".join(told))

    def training(self, history: list[dict], name: str, title: str, unit: str = "nats per record") -> Markup:
        from mmimpute.report import figures

        last = history[-1]
        end = f"{decimal(last.get(name))} learnt from, {decimal(last.get('tune_' + name))} not"
        return self._svg(figures.training(history, name, title, unit), f"{title} over {len(history)} epochs; last epoch: {end}")

    def skill(self, scores: list[dict], title: str) -> Markup:
        from mmimpute.report import figures

        label = title + ": " + ", ".join(f"{score['name']} {score['skill']:.2f}" for score in scores[:10] if score["skill"] is not None)
        return self._svg(figures.skill(scores, title), label)

    def drift(self, found: dict) -> Markup:
        from mmimpute.report import figures

        settings = found["settings"]
        label = "Population stability index: " + ", ".join(f"{f['name']} {f['psi']:.2f}" for f in found["features"][:10])
        return self._svg(figures.drift(found["features"], settings["psi_moderate"], settings["psi"]), label)

    def missing(self, modalities: list[dict]) -> Markup:
        from mmimpute.report import figures

        shares = (f"{m['name']} {percent(m['missing'])}, {percent(m['training'])} in training" for m in modalities)
        return self._svg(figures.missing(modalities), "Records without a modality: " + ", ".join(shares))

    def coverage(self, modality: dict) -> Markup:
        from mmimpute.report import figures

        calibration = modality["calibration"]
        label = f"Interval coverage of {modality['name']}: " + ", ".join(
            f"nominal {percent(nominal)}, observed {percent(observed)}"
            for nominal, observed in zip(calibration["nominal"], calibration["observed"], strict=True)
        )
        return self._svg(figures.coverage(calibration, modality["name"]), label)

    def reliability(self, modality: dict) -> Markup:
        from mmimpute.report import figures

        bins = modality["reliability"]
        label = f"Reliability of {modality['name']}: " + ", ".join(
            f"predicted {percent(bin['predicted'])}, observed {percent(bin['observed'])}" for bin in bins
        )
        return self._svg(figures.reliability(bins, modality["name"]), label)

    def pit(self, modality: dict) -> Markup:
        from mmimpute.report import figures

        counts = modality["pit"]
        highest = max(counts) * len(counts) / sum(counts)
        label = f"Histogram of predictive quantiles of {modality['name']}: {len(counts)} bins, the highest {highest:.2f} times the flat one"
        return self._svg(figures.pit(counts, modality["name"]), label)

    def dots(self, entries: list[dict], series: dict[str, str], title: str, label: str) -> Markup:
        """series: key of an entry -> what it is called."""
        values = {told: [e[key] for e in entries] for key, told in series.items()}
        return self._dots([e["name"] for e in entries], values, title, label)

    def samples(self, entries: list[dict]) -> Markup:
        names = list(dict.fromkeys(e["name"] for e in entries))
        found = {(e["name"], e["samples"]): e["coverage"] for e in entries}
        values = {told: [found.get((n, told)) for n in names] for told in SAMPLES.values()}
        return self._dots(names, values, "Coverage by modality", "share of real people near a sample")

    def likelihood(self, entries: list[dict]) -> Markup:
        values = [_around(e["per_value"]["mean"], 1.96 * e["per_value"]["std_error"]) for e in entries]
        return self._dots([e["name"] for e in entries], {"nats a value": values}, "Log-likelihood of a value", "nats, 95 % interval")

    def probe(self, entries: list[dict]) -> Markup:
        values = {told: [e[key]["auroc"] and tuple(e[key]["auroc"]) for e in entries] for key, told in (("z0", "z0"), ("raw", "values"))}
        return self._dots([e["name"] for e in entries], values, "The label by a linear probe", "AUROC, 95 % interval")

    def retrieval(self, entries: list[dict]) -> Markup:
        values = {told: [e[key]["10"] for e in entries] for key, told in (("recall", "through z0"), ("chance", "by chance"))}
        return self._dots([f"{e['query']} → {e['among']}" for e in entries], values, "Found among the first ten", "share of people")

    def labels(self, heads: list[dict]) -> Markup:
        from mmimpute.report import figures

        told = (f"{head['name']} {decimal(head['curve'][-1][1])} by {count(head['curve'][-1][0])} labels" for head in heads)
        return self._svg(figures.labels(heads), "AUROC by the number of labels: " + ", ".join(told))

    def _dots(self, names: list[str], values: dict[str, list], title: str, label: str) -> Markup:
        from mmimpute.report import figures

        first = ", ".join(
            f"{n} {decimal(v[0] if isinstance(v, tuple) else v)}" for n, v in zip(names[:10], next(iter(values.values())), strict=False)
        )
        return self._svg(figures.dots(names, values, title, label), f"{title}, {next(iter(values))}: {first}")

    def distribution(self, shown: dict) -> Markup:
        from mmimpute.report import figures

        edges = shown["edges"]
        label = f"Observed and imputed distribution of {shown['name']}, from {edges[0]:.3g} to {edges[-1]:.3g}"
        return self._svg(figures.distribution(shown), label)

    def distributions(self, modality: dict) -> list[dict]:
        return modality["distributions"][:MOST_DISTRIBUTIONS]

    def _svg(self, figure, label: str) -> Markup:
        from mmimpute.report import figures

        self.drawn += 1
        return Markup(figures.svg(figure, f"f{self.drawn}", label))


def _around(centre: float, width: float) -> tuple[float, float, float]:
    return centre, centre - width, centre + width


# --- how values read -------------------------------------------------------------------------------------------------------------------


def count(n: int | str | None) -> str:
    return "–" if n is None else n if isinstance(n, str) else f"{n:,}"


def decimal(x: float | None, digits: int = 2) -> str:
    """Plain where it is short, scientific where it is not."""
    if x is None:
        return "–"
    if x and not 1e-3 <= abs(x) < 1e6:
        return f"{x:.2e}"
    return f"{round(x, digits) + 0.0:,.{digits}f}" if abs(x) < 1000 else f"{x:,.0f}"


def percent(x: float | None) -> str:
    """Whole percent, and never 0 or 100 for what is neither."""
    if x is None:
        return "–"
    return "<1 %" if 0 < x < 0.005 else ">99 %" if 0.995 <= x < 1 else f"{100 * x:.0f} %"


def duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(iso: str | None) -> str:
    """A time as people read it; text that is no time is left as it is."""
    try:
        return f"{datetime.datetime.fromisoformat(iso):%d %B %Y, %H:%M %Z}".strip(" ,") if iso else ""
    except ValueError:
        return str(iso)


def url(address: str | None) -> Markup | str:
    """A link where a browser can follow it, else the text: `s3://` addresses and paths are for tools."""
    if address and address.startswith(("https://", "http://", "file://")):
        return Markup('<a href="{0}"><code>{0}</code></a>').format(address)
    return Markup("<code>{}</code>").format(address) if address else "–"
