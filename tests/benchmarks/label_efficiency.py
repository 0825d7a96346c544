"""How many labels of a scarce kind a classifier needs, after pre-training on labels that are cheap and without it.

    python tests/benchmarks/label_efficiency.py DATA OUT [--cases nhanes_liver ...] [--seeds 5] [--shares .01 ... 1] [--epochs N]

DATA holds <cohort>.parquet: one row per person, `<modality>__<feature>` and `outcome__*`. Per seed 30% of the people are held out; the
others pre-train without the target, and a share of their target labels fits the classifiers. AUROC on the people held out (of several
classes: mean of each against the others), mean over seeds with the 95% interval of Student's t. Writes OUT/<case>.json, .md and .png.

Every classifier reads the same inputs. Cheap labels are no inputs, and are read in pre-training only:

    nhanes_liver   fatty liver by ultrasound elastography; cheap: HbA1c and HDL from the same blood draw. An expert device stands
                   against routine tests. Where HbA1c is known in service too it would simply be an input.
    eicu_los       death in hospital from the first day's records; cheap: days in the ICU and in hospital, from billing. The stay ends
                   with death, so the label knows a little of the target; it is not its cause.
    eicu_apache    the same; cheap: the APACHE IVa score. A flattering one: others learnt its weights from deaths, and it is computed
                   from first-day values many of which are inputs. It stands for a score that is routinely at hand.
    tcga_pam50     subtype of breast cancer, an RNA assay; inputs: methylation, miRNA, copy numbers, mutations, not RNA; cheap: stage,
                   histology and age, from any pathology report.
    diabetes130    readmission within 30 days; cheap: days in hospital.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from downstream import write_cohort
from scipy.stats import t as student
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmimpute.data import labels as label_columns
from mmimpute.data import profile
from mmimpute.data.arrow import decode, flat, texts
from mmimpute.data.schema import CohortSchema, draft_schema
from mmimpute.data.shards import fetch_table
from mmimpute.data.tensors import to_model
from mmimpute.finetuning import auroc
from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.contrastive import ContrastConfig, ContrastiveVAE
from mmimpute.model.head import Head, Labels, fit_full, fit_linear
from mmimpute.spec import ContrastiveLabel, ContrastiveSpec
from mmimpute.training import OptimiserSettings, fit_in_memory, schedule

HELD_OUT = 0.3
FEW = 100  # labelled people below which none is set apart to stop fine-tuning
SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
SOFT = ContrastiveLabel(soft=True)
BINS = ContrastiveLabel(bins=4)


class Case(NamedTuple):
    cohort: str
    target: str
    inputs: tuple[str, ...]
    cheap: dict[str, ContrastiveLabel]
    rows: int = 4_000  # people at most


DAY_ONE = ("demo", "labs", "vitals", "history")  # what was coded and given later covers the whole stay
CASES = {
    "nhanes_liver": Case(
        "nhanes2017",
        "outcome__liver_steatosis_cap274",
        ("demo", "body", "chem", "lifestyle"),
        {"glyco__hba1c": SOFT, "glyco__hdl": SOFT},
    ),
    "eicu_los": Case("eicu_demo", "outcome__hospital_death", DAY_ONE, {"outcome__icu_los_days": BINS, "outcome__hosp_los_days": BINS}),
    "eicu_apache": Case("eicu_demo", "outcome__hospital_death", DAY_ONE, {"outcome__apache_iva_score": SOFT}),
    "tcga_pam50": Case(
        "tcga_brca",
        "outcome__pam50",
        ("meth", "mirna", "cnv", "mut"),
        {"clinical__stage": BINS, "clinical__hist_lobular": BINS, "clinical__age": SOFT},
    ),
    "diabetes130": Case(
        "diabetes130", "outcome__readmitted_30d", ("demo", "admission", "util", "labs", "dx", "meds"), {"outcome__los_days": SOFT}
    ),
}


@dataclass(frozen=True)
class People:
    """x: N x width, NaN where not observed; cheap: N x labels; dear: class of the target, -1 where there is none."""

    schema: CohortSchema
    x: np.ndarray
    cheap: np.ndarray
    dear: np.ndarray
    classes: int
    terms: ContrastConfig
    table: pa.Table


def read(case: Case, data: Path) -> People:
    table = pq.read_table(data / f"{case.cohort}.parquet")
    rows = np.sort(np.random.default_rng(0).permutation(len(table))[: case.rows])
    table = table.take(rows)
    with tempfile.TemporaryDirectory() as folder:
        spec = write_cohort(table, Path(folder))
        lists = fetch_table(folder, "part-000.parquet")
    chosen = {name: spec.modalities[name] for name in case.inputs}
    asked = ContrastiveSpec(labels=case.cheap)
    for column in case.cheap:
        lists = lists if column in lists.column_names else lists.append_column(column, table.column(column))
    spec = spec.model_copy(update={"modalities": chosen, "contrastive": asked})
    draft = draft_schema(spec, lists.schema, {m.column: len(m.features) for m in chosen.values()})
    settled = label_columns.settle(draft.contrastive, {c: texts(lists, c) for c in case.cheap})
    levels, dear = label_columns.classes(texts(table, case.target), case.target)
    schema, _ = profile.settle(draft, profile.observe(lists, draft, "a table", 1.0))  # kinds and levels
    terms = ContrastConfig(tuple(label.weight for label in settled.labels), tuple(label.soft for label in settled.labels))
    cheap = label_columns.encode(lists, settled, "a table")
    return People(schema, flat(decode(lists, schema, "a table")), cheap, dear, len(levels), terms, lists)


class Pretrained(NamedTuple):
    """A model and z0 of everyone."""

    vae: MultiModalVAE
    z0_1NL: Tensor


class Setting:
    """One seed: who is held out, and the networks pre-trained on the others."""

    def __init__(self, people: People, seed: int, epochs: int | None) -> None:
        rng = np.random.default_rng(seed)
        self.people, self.seed, self.epochs = people, seed, epochs
        self.test_N = rng.random(len(people.x)) < HELD_OUT
        train = np.flatnonzero(~self.test_N)
        schema = people.schema
        seen = profile.observe(people.table.take(train), schema, "a table", 1.0)
        self.statistics = {name: FeatureStatistics(**arrays) for name, arrays in profile.feature_statistics(schema, seen).items()}
        modalities = tuple(
            ModalityConfig(m.name, tuple(f.kind for f in m.features), tuple(len(f.levels) for f in m.features)) for m in schema.modalities
        )
        self.config = ModelConfig.for_rows(modalities, len(train), members=1)
        self.data = to_model(people.x, [len(m.features) for m in schema.modalities])
        self.train = torch.from_numpy(train)
        self.fold = torch.where(torch.from_numpy(rng.random(len(train)) < 0.1), 0, -1)
        self.order = rng.permutation(train[people.dear[train] >= 0])

    def pretrain(self, terms: ContrastConfig | None) -> Pretrained:
        """The VAE, or with a contrast."""
        torch.manual_seed(self.seed)
        vae = ContrastiveVAE(self.config, self.statistics, terms) if terms else MultiModalVAE(self.config, self.statistics)
        data = tuple([t[self.train] for t in part] for part in self.data)
        labels = torch.from_numpy(self.people.cheap)[self.train] if terms else None
        plan = schedule(len(self.train), epochs=self.epochs)
        return self.embed(fit_in_memory(vae, data, self.fold, OptimiserSettings(seed=self.seed), plan, labels).model)

    def untrained(self) -> Pretrained:
        torch.manual_seed(self.seed)
        return self.embed(MultiModalVAE(self.config, self.statistics))

    @torch.no_grad()
    def embed(self, vae: MultiModalVAE) -> Pretrained:
        inputs = vae.eval().inputs(*self.data)
        return Pretrained(vae, Head(1, self.config.shared, ()).latents(vae, inputs.codes, inputs.present_BK))

    def labelled(self, share: float) -> np.ndarray:
        """The first people of each class in this seed's order: nested, and two of each class at least."""
        dear = self.people.dear[self.order]
        each = [self.order[dear == c] for c in range(self.people.classes)]
        return np.concatenate([rows[: max(2, round(share * len(rows)))] for rows in each])

    def labels(self, rows: np.ndarray, judged: bool) -> Labels:
        """judged: a quarter of them is set apart to judge the others, unless they are few."""
        known = np.full(len(self.people.x), -1)
        known[rows] = self.people.dear[rows]
        fold = np.full(len(known), -1)
        if judged and len(rows) >= FEW:
            fold[rows[np.arange(len(rows)) % 4 == 0]] = 0
        found = Labels.of(torch.from_numpy(known)[:, None], [self.people.classes], torch.from_numpy(fold), 1, False)
        return found if (fold == 0).any() else Labels(found.classes_NT, found.sizes, found.learn, found.learn)

    def linear(self, base: Pretrained, rows: np.ndarray) -> np.ndarray:
        return self.probabilities(fit_linear(base.z0_1NL, self.labels(rows, False)), base.vae)

    def full(self, base: Pretrained, rows: np.ndarray, epochs: int = 20, lr: float = 2e-4) -> np.ndarray:
        labels = self.labels(rows, True)
        inputs = base.vae.inputs(*self.data)
        return self.probabilities(fit_full(base.vae, fit_linear(base.z0_1NL, labels), inputs, labels, epochs, lr, self.seed), base.vae)

    def probabilities(self, head: Head, vae: MultiModalVAE) -> np.ndarray:
        return head.predict(vae, *self.data)[0].numpy()

    def boosted(self, rows: np.ndarray) -> np.ndarray:
        leaf = int(np.clip(len(rows) // 10, 2, 20))
        x = self.people.x[:, ~np.isnan(self.people.x[rows]).all(0)]
        model = HistGradientBoostingClassifier(min_samples_leaf=leaf, early_stopping=False, random_state=self.seed)
        return model.fit(x[rows], self.people.dear[rows]).predict_proba(x)  # every class is among the rows

    def logistic(self, rows: np.ndarray) -> np.ndarray:
        """Standardised, with missing values at the mean, the number of inputs as the ridge penalty."""
        train = self.people.x[~self.test_N]
        mean, std = np.nanmean(train, 0), np.nanstd(train, 0)
        z = np.nan_to_num((self.people.x - mean) / np.where(std > 0, std, 1)).clip(-5, 5)
        return LogisticRegression(C=1 / z.shape[1], max_iter=2000).fit(z[rows], self.people.dear[rows]).predict_proba(z)

    def score(self, p: np.ndarray) -> float:
        judged = self.test_N & (self.people.dear >= 0)
        return auroc(self.people.dear[judged], p[judged])


def methods(at: Setting) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> probabilities of everyone from labelled people."""
    terms = at.people.terms
    both = at.pretrain(terms)
    alone = at.pretrain(ContrastConfig(terms.weights, terms.soft, alone=True))
    itself, plain, fresh = at.pretrain(ContrastConfig(alone=True)), at.pretrain(None), at.untrained()
    return {
        "contrast alone, linear head": lambda rows: at.linear(alone, rows),
        "contrast alone, fine-tuned": lambda rows: at.full(alone, rows),
        "contrast and L, linear head": lambda rows: at.linear(both, rows),
        "supervised from scratch": lambda rows: at.full(fresh, rows, 40, 2e-3),
        "plain VAE, linear head": lambda rows: at.linear(plain, rows),
        "SimCLR, linear head": lambda rows: at.linear(itself, rows),
        "gradient boosting on inputs": at.boosted,
        "logistic regression on inputs": at.logistic,
    }


def measure(people: People, seed: int, shares: list[float], epochs: int | None) -> Iterator[dict]:
    """One record per share and method."""
    at = Setting(people, seed, epochs)
    found = methods(at)
    for share in shares:
        rows = at.labelled(share)
        for name, fit in found.items():
            yield {"seed": seed, "share": share, "people": len(rows), "method": name, "auroc": at.score(fit(rows))}


def band(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95% interval."""
    spread = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(student.ppf(0.975, len(values) - 1) * spread) if len(values) > 1 else np.nan


def values_of(records: list[dict], method: str, share: float) -> np.ndarray:
    """By seed."""
    kept = [r for r in records if r["method"] == method and r["share"] == share]
    return np.array([r["auroc"] for r in sorted(kept, key=lambda r: r["seed"])])


def markdown(name: str, records: list[dict]) -> str:
    shares, names = sorted({r["share"] for r in records}), list(dict.fromkeys(r["method"] for r in records))
    people = {share: next(r["people"] for r in records if r["share"] == share) for share in shares}
    lines = [f"{name}: AUROC on people held out, {len({r['seed'] for r in records})} seeds", ""]
    lines += ["| | " + " | ".join(f"{share:.0%} ({people[share]:,})" for share in shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for method in names:
        cells = [band(values_of(records, method, share)) for share in shares]
        lines.append(f"| {method} | " + " | ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in cells) + " |")
    first = names[0]
    lines += ["", f"{first}, minus each of the others (paired by seed):", "", lines[2], lines[3]]
    for method in names[1:]:
        cells = [band(values_of(records, first, share) - values_of(records, method, share)) for share in shares]
        lines.append(f"| {method} | " + " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in cells) + " |")
    return "\n".join(lines) + "\n"


def draw(name: str, records: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shares = sorted({r["share"] for r in records})
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for method in dict.fromkeys(r["method"] for r in records):
        mean, half = np.array([band(values_of(records, method, share)) for share in shares]).T
        (line,) = axes.plot(shares, mean, marker="o", markersize=3, label=method)
        axes.fill_between(shares, mean - half, mean + half, alpha=0.1, color=line.get_color(), linewidth=0)
    axes.set(xscale="log", xlabel="share of the target labels", ylabel="AUROC on people held out", title=name)
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--epochs", type=int)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.cases:
        people, records = read(CASES[name], given.data), []
        for seed in range(given.seeds):
            began = time.perf_counter()
            records += measure(people, seed, given.shares, given.epochs)
            (given.out / f"{name}.json").write_text(json.dumps(records))
            (given.out / f"{name}.md").write_text(markdown(name, records))
            draw(name, records, given.out / f"{name}.png")
            print(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        print(markdown(name, records), flush=True)


if __name__ == "__main__":
    main()
