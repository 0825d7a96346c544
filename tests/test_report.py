"""The report: complete, self-contained, escaped, and blind to groups of fewer than ten people."""

import copy
import datetime
import html.parser
import re
import subprocess
import sys

import markupsafe
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mmimpute.report import disclosure, render
from mmimpute.report.render import count, decimal, duration, percent

NOMINAL = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]


def a_feature(name: str, **facts) -> dict:
    return {"name": name, "kind": "real", "log": False, **facts}


def a_run() -> dict:
    """Two modalities, one shard set aside, every part filled."""
    return {
        "title": "A cohort",
        "started": datetime.datetime(2026, 11, 21, 2, 0, tzinfo=datetime.UTC).isoformat(),
        "seconds": {"plan": 1.2, "fit": 50.1, "impute": 3.0},
        "version": "0.1.0",
        "model_digest": "9f2c0e3b",
        "model_url": "s3://bucket/models/9f2c0e3b",
        "table_url": "https://example.org/table",
        "table_version": 3,
        "shards": {"total": 16, "new": 15, "already_done": 0, "set_aside": [{"shard": "part-3.parquet", "error": "not Parquet"}]},
        "rows": 9254,
        "from_prior": 12,
        "heads": [
            {"column": "outcome__died", "levels": ["0", "1"], "people": 1278, "auroc": 0.833, "curve": [[64, 0.807], [1278, 0.833]]},
            {"column": "stage", "levels": ["I", "II", "III"], "people": 12, "auroc": None, "curve": []},
        ],
        "imputed": {"labs": {"rows": 3354, "values": 12345}, "dx": {"rows": 250, "values": 500}},
        "profile": {
            "rows": 9254,
            "modalities": {
                "labs": {
                    "present": 5905,
                    "features": [
                        a_feature("LBXSAL", observed=5900, mean=4.1, std=0.35, low=2.6, high=5.0),
                        a_feature("LBXSCR", observed=5898, mean=-0.2, std=0.3, low=-1.0, high=1.8, log=True),
                    ],
                },
                "dx": {
                    "present": 9000,
                    "features": [a_feature("hep_c", kind="binary", observed=9000, mean=0.02, std=0.14, low=0, high=1)],
                },
            },
            "together": [[5905, 5800], [5800, 9000]],
            "patterns": [{"present": ["labs", "dx"], "rows": 5800}, {"present": ["dx"], "rows": 3200}, {"present": ["labs"], "rows": 105}],
        },
        "history": [
            {
                "epoch": e,
                "elbo": e - 80.0,
                "impute": e - 40.0,
                "tune_elbo": e - 81.0,
                "tune_impute": e - 41.0,
                "tune_loss": 1 - e / 50,
                "rows_per_second": 5000,
            }
            for e in range(1, 6)
        ],
        "evaluation": {
            "rows": 912,
            "modalities": {
                "labs": {
                    "rows": 581,
                    "skill": 0.13,
                    "r2": 0.22,
                    "auroc": None,
                    "cover90": 0.91,
                    "ece": None,
                    "features": [
                        {"name": "LBXSAL", "kind": "real", "n": 580, "skill": 0.2, "r2": 0.3, "auroc": None},
                        {"name": "LBXSCR", "kind": "real", "n": 570, "skill": -0.04, "r2": 0.0, "auroc": None},
                    ],
                    "calibration": {"nominal": NOMINAL, "observed": [x - 0.02 for x in NOMINAL]},
                    "reliability": [],
                    "pit": [50 + i for i in range(20)],
                    "distributions": [
                        {"name": "LBXSAL", "edges": [2.0, 3.0, 4.0, 5.0], "observed": [40, 500, 60], "imputed": [30, 60, 20]}
                    ],
                },
                "dx": {
                    "rows": 890,
                    "skill": -0.01,
                    "r2": None,
                    "auroc": 0.71,
                    "cover90": None,
                    "ece": 0.012,
                    "features": [{"name": "hep_c", "kind": "binary", "n": 890, "skill": -0.01, "r2": None, "auroc": 0.71}],
                    "calibration": None,
                    "reliability": [{"predicted": 0.05, "observed": 0.06, "n": 700}, {"predicted": 0.4, "observed": 0.35, "n": 190}],
                    "pit": None,
                    "distributions": [],
                },
            },
        },
    }


def a_drift() -> dict:
    """What a stage found of two new shards; the second feature was seen too rarely to be judged."""
    features = [{"modality": "labs", "name": "LBXSAL", "psi": 0.41, "noise": 0.05}, {"modality": "labs", "name": "LBXSCR"}]
    return {
        "drifted": True,
        "judged": True,
        "reasons": ["labs: LBXSAL has another distribution (PSI 0.41)"],
        "rows": 1200,
        "shards": 2,
        "settings": {"psi": 0.25, "psi_moderate": 0.1},
        "features": [{"psi": None, "noise": None} | f for f in features],
        "modalities": {
            "labs": {"missing": {"drop": 0.5, "training": 0.36}, "score": {"shift": -0.6, "noise": 0.1}},
            "dx": {"missing": None, "score": None},
        },
    }


@pytest.fixture(scope="module")
def page() -> str:
    return render(a_run())


def test_drift_is_shown(page):
    drifted = render(a_run() | {"drift": a_drift()})
    assert drifted.count("<svg") == page.count("<svg") + 2
    assert "PSI 0.41" in drifted and "fit the model anew" in drifted and "labs 50 %, 36 % in training" in drifted
    assert not Checker(drifted).silent and not Checker(drifted).open
    for absent in (None, {"drifted": False, "reasons": [], "shards": 0}, a_drift() | {"judged": False}):
        assert render(a_run() | {"drift": absent}) == page


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "$\\frac{1}{0}$ {{ 7 * 7 }}"])
def test_names_in_drift_are_escaped(hostile):
    drift = a_drift()
    drift["features"][0]["name"] = drift["reasons"][0] = hostile
    drift["modalities"][hostile] = drift["modalities"]["labs"]
    assert not Checker(render(a_run() | {"drift": drift})).tags & {"script", "img"}


class Checker(html.parser.HTMLParser):
    """Collects what could reach for a network or a script, element ids and images without a text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.ids, self.references, self.silent, self.open = set(), [], [], 0, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.silent += tag == "svg" and not attributes.get("aria-label")
        self.references += [(tag, value) for name, value in attributes.items() if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in ("meta", "br", "img", "link", "input", "path", "use", "rect", "stop"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"


def test_page_is_self_contained_and_accessible(page):
    checker = Checker(page)
    assert not checker.tags & {"script", "link", "img", "iframe", "object", "embed"}
    assert {href for tag, href in checker.references if not href.startswith("#")} == {"https://example.org/table"}
    assert "url(http" not in page and "@import" not in page
    assert "default-src 'none'" in page
    assert not checker.silent and not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    assert {href[1:] for _, href in checker.references if href.startswith("#")} <= set(checker.ids)


def test_page_says_what_the_run_did(page):
    facts = ("A cohort", "21 November 2026, 02:00 UTC", "9,254", "s3://bucket/models/9f2c0e3b", "version 3", "15 new", "part-3.parquet")
    assert [fact for fact in facts if fact not in page] == []
    assert "An imputation is not a measurement" in page
    drawn = "patterns, training, skill, two of features, coverage, reliability, PIT, distribution, labels"
    assert page.count("<svg") == 1 + 3 + 1 + 2 + 1 + 1 + 1 + 1 + 1, drawn


def test_the_same_run_makes_the_same_page(page):
    assert render(a_run()) == page


@pytest.mark.parametrize(
    "part", ["history", "evaluation", "heads", "profile", "imputed", "seconds", "shards", "started", "table_url", "from_prior"]
)
def test_a_missing_part_is_left_out(part):
    for absent in (None, "gone"):
        run = a_run()
        run[part] = None
        if absent == "gone":
            del run[part]
        assert "Limits" in render(run)


def test_nothing_but_a_title():
    assert "A cohort" in render({"title": "A cohort"})


def test_undefined_statistics_are_dashes():
    run = a_run()
    run["evaluation"]["modalities"]["labs"] |= {"skill": float("nan"), "r2": float("inf"), "calibration": None, "pit": [0] * 20}
    run["profile"]["modalities"]["labs"]["features"][0] |= {"mean": None, "std": float("nan")}
    run["history"][-1] |= {"tune_impute": None, "elbo": float("nan")}
    page = render(run)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL) and "inf<" not in page


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b <i>", "$\\frac{1}{0}$ {{ 7 * 7 }}"]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_text_is_escaped(hostile):
    run = a_run()
    run["title"] = run["model_digest"] = run["model_url"] = run["started"] = hostile
    run["shards"]["set_aside"] = [{"shard": hostile, "error": hostile}]
    run["profile"]["modalities"] = {hostile: run["profile"]["modalities"]["labs"], "dx": run["profile"]["modalities"]["dx"]}
    labs = run["evaluation"]["modalities"]["labs"]
    labs["features"][0]["name"] = labs["distributions"][0]["name"] = hostile
    run["evaluation"]["modalities"] = {hostile: labs}
    page = render(run)
    assert not Checker(page).tags & {"script", "img"}
    assert f"<h1>{markupsafe.escape(hostile)}</h1>" in page


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "s3://bucket/x"])
def test_only_web_addresses_become_links(address):
    run = a_run() | {"table_url": address, "model_url": address}
    assert not [href for tag, href in Checker(render(run)).references if not href.startswith("#")]


def test_many_features_are_cut_by_the_stated_rule():
    run = a_run()
    labs = run["evaluation"]["modalities"]["labs"]
    labs["features"] = [{"name": f"gene{i}", "kind": "real", "n": 500, "skill": i / 500, "r2": None, "auroc": None} for i in range(300)]
    page = render(run)
    svg = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if "the 30 features with the highest skill" in svg)
    assert sorted(int(i) for i in re.findall(r">gene(\d+)<", svg)) == list(range(270, 300))
    assert "The first 200 of 300 features." in page and ">gene99<" not in page


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, mmimpute.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- disclosure ------------------------------------------------------------------------------------------------------------------------

small = st.integers(1, 9)
finite = st.floats(-1e6, 1e6, allow_nan=False)


@st.composite
def small_groups(draw) -> dict:
    """A run in which every kind of group that a report knows has a member of one to nine people, with statistics of its own."""
    run = a_run()
    number = lambda: draw(finite)  # noqa: E731
    run["from_prior"] = draw(small)
    run["imputed"]["rare"] = {"rows": draw(small), "values": draw(st.integers(1, 900))}
    profile = run["profile"]
    feature = {"kind": "real", "log": draw(st.booleans())}
    statistics = {name: number() for name in ("mean", "std", "low", "high")}
    profile["modalities"]["labs"]["features"].append({"name": "few_observed", "observed": draw(small), **feature, **statistics})
    ones = draw(small)
    rates = {"mean": ones / 9000, "std": (ones / 9000 * (1 - ones / 9000)) ** 0.5, "low": 0, "high": 1}
    profile["modalities"]["dx"]["features"].append({"name": "few_ones", "kind": "binary", "observed": 9000, "log": False, **rates})
    zeros = {**rates, "mean": 1 - ones / 9000}
    profile["modalities"]["dx"]["features"].append({"name": "few_zeros", "kind": "binary", "observed": 9000, "log": False, **zeros})
    present = draw(small)
    profile["modalities"]["rare"] = {"present": present, "features": []}
    profile["together"] = [[5905, 5800, draw(small)], [5800, 9000, draw(small)], [draw(small), draw(small), present]]
    profile["patterns"].append({"present": draw(st.permutations(["rare", "labs", "dx"])), "rows": draw(small)})
    labs, dx = run["evaluation"]["modalities"]["labs"], run["evaluation"]["modalities"]["dx"]
    labs["features"].append({"name": "few_values", "kind": "real", "n": draw(small), "skill": number(), "r2": number(), "auroc": number()})
    distribution = labs["distributions"][0]
    distribution["edges"] = [draw(st.floats(-9, 1.9)), *distribution["edges"], draw(st.floats(5.1, 99))]
    distribution["observed"] = [draw(small), *distribution["observed"], draw(small)]
    distribution["imputed"] = [draw(small), *distribution["imputed"], draw(small)]
    labs["distributions"].append({"name": "few_values", "edges": [number(), number()], "observed": [draw(small)], "imputed": [draw(small)]})
    labs["distributions"].append({"name": "few_binned", "edges": [0.0, number()], "observed": [draw(small)], "imputed": [500]})
    labs["pit"] = None
    dx["reliability"].append({"predicted": number(), "observed": number(), "n": draw(small)})
    dx["reliability"].append({"predicted": 0.01, "observed": draw(small) / 700, "n": 700})
    run["evaluation"]["modalities"]["rare"] = {
        **{name: number() for name in ("skill", "r2", "auroc", "cover90", "ece")},
        "rows": draw(small),
        "features": [{"name": draw(st.text(max_size=3)), "kind": "real", "n": 3, "skill": number(), "r2": None, "auroc": None}],
        "calibration": {"nominal": [0.5, 0.9], "observed": [number(), number()]},
        "reliability": [{"predicted": number(), "observed": number(), "n": 5}],
        "pit": draw(st.lists(small, min_size=20, max_size=20)),
        "distributions": [{"name": "x", "edges": [number(), number()], "observed": [50], "imputed": [50]}],
    }
    return run


@settings(max_examples=200, deadline=None)
@given(small_groups(), small_groups())
def test_the_view_does_not_depend_on_small_groups(one, other):
    """Non-interference: whatever the small groups hold, what may be shown is the same."""
    assert disclosure.view(one) == disclosure.view(other)


@settings(max_examples=3, deadline=None, phases=[Phase.generate])
@given(small_groups(), small_groups())
def test_the_page_does_not_depend_on_small_groups(one, other):
    page = render(one)
    assert page == render(other)
    assert "&lt;10" in page


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 9))
def test_counts_are_rounded_so_that_no_small_group_follows_by_subtraction(n, m):
    if n >= 10:
        assert disclosure.people(n) % 10 == 0 and abs(disclosure.people(n) - n) <= 5
        assert disclosure.people(n + m) - disclosure.people(n) in (0, 10)
    assert disclosure.people(m) == ("<10" if m else 0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=0, max_size=40))
def test_merged_bins_hold_no_small_group(counts):
    merged = disclosure.merged(list(counts))
    if merged is not None:
        assert sum(merged) == sum(counts) and not any(0 < n < 10 for n in merged) and len(counts) % len(merged) == 0
    if counts and sum(counts) and not any(0 < n < 10 for n in counts):
        assert merged == counts


def test_render_shows_only_the_view(monkeypatch):
    """The template and the figures receive what `view` returns and nothing else of the run."""
    monkeypatch.setattr(sys.modules["mmimpute.report.render"], "view", lambda run: disclosure.view(a_run()))
    assert render({"title": "leak", "rows": 7, "secret": "leak"}) == render(a_run())


def test_the_run_is_left_as_it_was():
    run = a_run()
    before = copy.deepcopy(run)
    render(run)
    assert run == before


# --- how values read -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (count(1234567), "1,234,567"),
        (count("<10"), "<10"),
        (count(None), "–"),
        (decimal(0.0), "0.00"),
        (decimal(-0.001), "0.00"),
        (decimal(0.00012), "1.20e-04"),
        (decimal(34670.7), "34,671"),
        (percent(0.9999), ">99 %"),
        (percent(0.001), "<1 %"),
        (percent(1.0), "100 %"),
        (duration(3.21), "3.2 s"),
        (duration(182), "3 min 2 s"),
        (duration(7260), "2 h 1 min"),
    ],
)
def test_values_read_well(written, expected):
    assert written == expected
