"""What noise in a modality costs, with and without reliability: the packaged NHANES cohort, in memory.

    python tests/benchmarks/robustness.py [--members 1] [--noise 4]

Three models: plain; trained with noise in every modality, all of which is believed; the same with learned reliability. Held-out
people have one modality corrupted at a time: by Gaussian noise of 0.5 to 8 sds of each feature (codes: another person's, as often as a
number would be noise), or the whole modality exchanged between people, which no model was trained for. Prints the mean skill of the other
modalities, each hidden in turn; "left out" is what a model would reach that knew which modality to ignore.
"""

import argparse
import io
from importlib.resources import files

import numpy as np
import pyarrow.parquet as pq
import torch
from pattern import statistics
from torch import Tensor

from mmimpute.evaluation import crps, log_loss
from mmimpute.model import Imputer, ModalityConfig, ModelConfig, MultiModalVAE
from mmimpute.model.reliability import Reliability, corrupt
from mmimpute.stacking import assemble
from mmimpute.training import fit_in_memory

NOISE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
EXCHANGED = "exchanged"


def cohort() -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
    """Values by modality, NaN where not observed, and kinds; features of few levels count as numbers here."""
    table = pq.read_table(io.BytesIO((files("mmimpute") / "resources" / "nhanes2017.parquet").read_bytes()))
    values, kinds = {}, {}
    for name in sorted({c.split("__")[0] for c in table.column_names if "__" in c} - {"outcome"}):
        columns = [c for c in table.column_names if c.startswith(f"{name}__")]
        values[name] = np.stack([table[c].to_numpy(zero_copy_only=False).astype(np.float32) for c in columns], 1)
        kinds[name] = tuple("binary" if set(np.unique(x[~np.isnan(x)])) <= {0, 1} else "real" for x in values[name].T)
    return values, kinds


def fit(x: list[Tensor], kinds: dict[str, tuple[str, ...]], members: int, noise: float) -> Imputer:
    torch.manual_seed(0)
    rows, observed = len(x[0]), [~v.isnan() for v in x]
    config = ModelConfig.for_rows(tuple(ModalityConfig(n, k, noise=noise) for n, k in kinds.items()), rows, members=members)
    vae = MultiModalVAE(config, {n: statistics(v.numpy(), o.numpy(), "") for n, v, o in zip(kinds, x, observed, strict=True)})
    fold_N = torch.arange(rows) % members if members > 1 else torch.where(torch.arange(rows) % 10 == 0, 0, -1)
    return assemble(fit_in_memory(vae, (x, observed), fold_N).model, x, observed, fold_N)


def believing(self: Reliability, codes: list[Tensor], present_BK: Tensor) -> Tensor:
    """In `Reliability.forward`'s place: all modalities count in full."""
    return torch.ones(len(self.net[0].weight), *present_BK.shape)


def skill(model: Imputer, truth: list[Tensor], given: list[Tensor], hidden: int, without: int | None) -> float:
    """Of one hidden modality: 1 - loss / loss of the marginal, mean over features."""
    masks = [~v.isnan() & (j not in (hidden, without)) for j, v in enumerate(given)]
    with torch.inference_mode():
        said = model.predict(given, masks)
    y, mean, std = (t[hidden].numpy() for t in (truth, said.mean, said.std))
    out = []
    for d, kind in enumerate(model.config.modalities[hidden].kinds):
        seen = ~np.isnan(y[:, d])
        v, m, s = y[seen, d], mean[seen, d], std[seen, d]
        if kind == "real":
            out.append(1 - crps(v, m, s).mean() / crps(v, v.mean(), v.std()).mean())
        else:
            out.append(1 - log_loss(v, m).mean() / log_loss(v, np.full_like(v, v.mean())).mean())
    return float(np.mean(out))


def noisy(model: Imputer, x: list[Tensor], j: int, level: float | str) -> list[Tensor]:
    """Records with modality j corrupted, NaN where they were."""
    generator = torch.Generator().manual_seed(j)
    seen_BD = ~x[j].isnan()
    if level == EXCHANGED:
        rows = seen_BD.any(1).nonzero().squeeze(1)
        corrupted_BD = x[j].clone()
        corrupted_BD[rows] = x[j][rows[torch.randperm(len(rows), generator=generator)]]
    else:
        signal_B = torch.full((len(x[j]),), 1 / (1 + level**2))
        filled_BD = torch.where(seen_BD, x[j], 0.0)
        real_D = getattr(model.vae, f"real_{j}")
        corrupted_BD = corrupt(filled_BD, seen_BD, real_D, model.vae.standardise[j], signal_B, generator).masked_fill(~seen_BD, torch.nan)
    return [corrupted_BD if k == j else v for k, v in enumerate(x)]


def curve(model: Imputer, x: list[Tensor], level: float | str, left_out: bool = False) -> float:
    """Mean over the corrupted modality and over the hidden one."""
    found = []
    for j in range(len(x)):
        given = noisy(model, x, j, level)
        found += [skill(model, x, given, hidden, j if left_out else None) for hidden in range(len(x)) if hidden != j]
    return float(np.mean(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--noise", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    values, kinds = cohort()
    held_out = np.random.default_rng(0).permutation(len(next(iter(values.values())))) % 5 == 0
    train, test = ([torch.from_numpy(v[part]) for v in values.values()] for part in (~held_out, held_out))
    levels = [*NOISE, EXCHANGED]
    print(f"{'':28}" + "".join(f"{level:>10}" for level in levels) + f"{'left out':>10}")
    forward, believed = Reliability.forward, MultiModalVAE.believed
    for name, noise, reliable in (
        ("plain", 0.0, True),
        ("noise, all believed", options.noise, False),
        ("reliability", options.noise, True),
    ):
        Reliability.forward = forward if reliable else believing
        MultiModalVAE.believed = believed if reliable else lambda self, inputs: inputs.observed
        model = fit(train, kinds, options.members, noise)
        row = [curve(model, test, level) for level in levels] + [curve(model, test, 0.0, left_out=True)]
        print(f"{name:28}" + "".join(f"{value:10.4f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
