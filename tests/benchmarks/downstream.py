"""What imputation does for outcome models, on real cohorts with outcomes.

    python tests/benchmarks/downstream.py DATA [--cohorts nhanes2017 ...] [--models FOLDER] [--draws 20] [--epochs N]

DATA holds <cohort>.parquet: one row per person, `<modality>__<feature>` and `outcome__*`. FOLDER/<cohort> holds a model
that was fitted to the cohort with its modalities as list columns; where there is none, one is fitted to all people first.
Prints, per outcome, estimates and predictions of complete cases, mean-filled, imputed and multiply imputed covariates.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.markup import escape

from mmimpute import jobs, planning, registry
from mmimpute.console import console, show_study
from mmimpute.data.shards import publish_table
from mmimpute.downstream import compare
from mmimpute.spec import ClusterSettings, CohortSpec, FitSettings
from mmimpute.studying import Question, from_shards

WIDEST = 1000  # features of a model of which all are covariates too
ROWS = 6000  # at most; more people only shorten the intervals


class Case(NamedTuple):
    cohort: str
    asked: Question


def question(event: str, features: str, exclude: str = "", equals: str | None = None, time: str | None = None) -> Question:
    return Question(event, equals, time, tuple(features.split()), tuple(exclude.split()))


CASES = [
    Case(  # 6.5% HbA1c or more: glyco is where it was measured
        "nhanes2017",
        question(
            "outcome__diabetes_lab",
            "demo[age] demo[male] demo[income_poverty_ratio] body[BMXBMI] body[BMXWAIST] chem[LBXSGL] chem[LBXSTR] chem[LBXSUA] "
            "chem[LBXSGTSI] liver_us[cap_dbm] lifestyle[drinks_per_day]",
            "glyco",
        ),
    ),
    Case(
        "nhanes2017",
        question(
            "outcome__liver_steatosis_cap274",
            "demo[age] demo[male] body[BMXBMI] body[BMXWAIST] chem[LBXSATSI] chem[LBXSTR] chem[LBXSUA] glyco[hba1c] glyco[hdl] "
            "glyco[log_fasting_insulin] lifestyle[drinks_per_day]",
            "liver_us",
        ),
    ),
    Case(  # what was given and coded covers the whole stay, and knows how it ended
        "eicu_demo",
        question(
            "outcome__hospital_death",
            "demo[age] demo[male] labs[bun] labs[creatinine] labs[albumin] labs[bilirubin] labs[wbc] labs[ph] vitals[heartrate] "
            "vitals[meanbp] vitals[respiratoryrate] vitals[motor]",
            "dx meds treat notes",
        ),
    ),
    Case(  # first visits; a transplant ends the follow-up
        "pbcseq",
        question(
            "outcome__status_0cens_1tx_2death",
            "demo[age_now] clinical[edema] clinical[histologic_stage] labs[bili] labs[chol] labs[albumin] labs[protime] labs[platelet] "
            "labs[ast]",
            equals="2",
            time="outcome__days_to_end",
        ),
    ),
    Case(
        "diabetes130",
        question(
            "outcome__readmitted_30d",
            "demo[age_mid] demo[male] util[number_inpatient] util[number_emergency] util[num_medications] util[number_diagnoses] "
            "labs[a1c_ordinal] labs[glucose_ordinal]",
        ),
    ),
    Case(
        "tcga_brca",
        question(
            "outcome__os_event",
            "clinical[age] clinical[stage] clinical[N] rna[PRAME_23532] rna[AGR3_155465] rna[ADH1B_125] mirna[hsa_mir_210] mut[TP53]",
            time="outcome__os_days",
        ),
    ),
]


def people(source: Path) -> pa.Table:
    """One row per person: of repeated visits the first."""
    table = pq.read_table(source)
    if "outcome__patient" in table.column_names:
        table = table.sort_by([("outcome__patient", "ascending"), ("demo__years_since_entry", "ascending")])
        _, first = np.unique(table.column("outcome__patient").to_numpy(), return_index=True)
        table = table.take(pa.array(first))
    if "outcome__os_days" in table.column_names:
        table = table.filter(pc.fill_null(pc.greater_equal(table.column("outcome__os_days"), 0), False))
    rows = np.random.default_rng(0).permutation(len(table))[:ROWS]
    return table.take(pa.array(np.sort(rows)))


def write_cohort(table: pa.Table, folder: Path) -> CohortSpec:
    """One shard with a list column per modality, and the cohort's spec."""
    features: dict[str, list[str]] = {}
    for name in table.column_names:
        modality, found, feature = name.partition("__")
        if found and modality != "outcome":
            features.setdefault(modality, []).append(feature)
    columns = {"subject_id": pa.array([str(i) for i in table.column("patient_id").to_pylist()])}
    for modality, names in features.items():
        x = np.stack([table.column(f"{modality}__{n}").to_numpy() for n in names], 1).astype(np.float32)
        values = pa.array(x.ravel(), from_pandas=True)
        columns[modality] = pa.FixedSizeListArray.from_arrays(values, len(names), mask=pa.array(np.isnan(x).all(1)))
    columns |= {name: table.column(name) for name in table.column_names if name.startswith("outcome__")}
    publish_table(str(folder), "part-000.parquet", pa.table(columns))
    modalities = {m: {"column": m, "features": names} for m, names in features.items()}
    return CohortSpec.model_validate({"outcomes": ("outcome__*",), "modalities": modalities})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cohorts", nargs="+", default=sorted({c.cohort for c in CASES}))
    parser.add_argument("--models", type=Path)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--epochs", type=int)
    given = parser.parse_args()
    for cohort in given.cohorts:
        with tempfile.TemporaryDirectory() as scratch:
            spec = write_cohort(people(given.data / f"{cohort}.parquet"), Path(scratch) / "shards")
            shards, home = str(Path(scratch) / "shards"), str((given.models or Path(scratch)) / cohort)
            if not (Path(home) / "champion.json").exists():
                fitted = jobs.fit_model(planning.survey(shards, spec), home, FitSettings(epochs=given.epochs), ClusterSettings())
                console.print(f"{cohort}: fitted in {fitted['seconds']:.0f} s")
            model = registry.load(home)
            for asked in (c.asked for c in CASES if c.cohort == cohort):
                began = time.perf_counter()
                every = [asked._replace(features=())] if model.schema.width <= WIDEST else []
                for chosen in (asked, *every):
                    which = "chosen covariates" if chosen.features else "every number as a covariate"
                    console.rule(f"{cohort}: {escape(asked.event)}, {which}")
                    show_study(compare(from_shards(model, shards, chosen, given.draws)))
                    console.print(f"{time.perf_counter() - began:.0f} s", style="dim")


if __name__ == "__main__":
    main()
