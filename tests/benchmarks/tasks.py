"""What a model is asked besides imputation, on real cohorts.

    python tests/benchmarks/tasks.py DATA [--cohorts nhanes2017 ...] [--models FOLDER] [--tasks probe ...]

DATA holds <cohort>.parquet: one row per person, `<modality>__<feature>` and `outcome__*`. FOLDER/<cohort>/model holds a model that was
fitted to all of it with its modalities as list columns; where there is none, one is fitted and kept there. Prints a table per task.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import get_args

import pyarrow.parquet as pq
from downstream import write_cohort

from mmimpute import jobs, planning, registry
from mmimpute.commands.tasks import task_tables
from mmimpute.console import console
from mmimpute.data.arrow import decode, flat, texts
from mmimpute.data.split import position
from mmimpute.spec import ClusterSettings, FitSettings, Task
from mmimpute.tasks.asking import ask, people_of

LABELS = {"nhanes2017": "outcome__liver_steatosis_cap274", "eicu_demo": "outcome__hospital_death", "tcga_brca": "outcome__pam50"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--cohorts", nargs="+", default=list(LABELS))
    parser.add_argument("--models", type=Path)
    parser.add_argument("--tasks", nargs="+", default=get_args(Task))
    given = parser.parse_args()
    for cohort in given.cohorts:
        folder = (given.models or Path(tempfile.mkdtemp())) / cohort
        spec = write_cohort(pq.read_table(given.data / f"{cohort}.parquet"), folder / "shards")
        if not (folder / "model" / "champion.json").exists():
            found = planning.survey(str(folder / "shards"), spec)
            done = jobs.fit_model(found, str(folder / "model"), FitSettings(), ClusterSettings())
            registry.promote(str(folder / "model"), done["digest"])
        model = registry.load(str(folder / "model"))
        table = pq.read_table(folder / "shards" / "part-000.parquet")
        x, place = flat(decode(table, model.schema, cohort)), position(table.column("subject_id"))
        people = people_of(model, x, place, texts(table, LABELS[cohort]), LABELS[cohort])
        for task in given.tasks:
            began = time.perf_counter()
            (shown,) = task_tables(ask(people, [task]))
            console.rule(f"{cohort}, {LABELS[cohort]}: {task}, {time.perf_counter() - began:.0f} s")
            console.print(shown)


if __name__ == "__main__":
    main()
