"""Training speed beside MultiVae's MVTCAE: records per CPU second at the same network size, one thread, own processes.

    python -m venv OTHER && OTHER/bin/pip install multivae    # an environment of its own: it brings its own torch
    python tests/benchmarks/throughput.py OTHER/bin/python

Complete random data in the sizes of NHANES; hidden layers, latent sizes and batches as our defaults have them. Each of the six encoders
of MVTCAE gets the hidden layers of our encoder of z0, or, in the line of small encoders, those of our private ones. "bare loop" is the
same loop over tensors in memory as ours, "its trainer" what its users run.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTHS = {"demo": 15, "body": 8, "chem": 24, "glyco": 4, "liver": 4, "lifestyle": 7}
ROWS, BATCH, STEPS, REPEATS, LEARNING_RATE = 6400, 256, 100, 5, 1e-3
SHARED, HIDDEN, DECODER = 64, 256, 128


def ours(members: int = 1, tails: str = "student") -> float:
    """`Training.step` with everything that belongs to it: hiding, both terms, clipping, weight average, sums. Records times members."""
    from mmimpute.model import FeatureStatistics, ModalityConfig, ModelConfig, MultiModalVAE
    from mmimpute.training import OptimiserSettings, Training, take

    modalities = tuple(ModalityConfig(name, ("real",) * width, tails=tails) for name, width in WIDTHS.items())
    config = ModelConfig(modalities, members=members, shared=SHARED, hidden=HIDDEN, decoder=DECODER)
    model = MultiModalVAE(config, {m.name: FeatureStatistics.blank(m.width) for m in modalities})
    training = Training(model, OptimiserSettings(), STEPS * (REPEATS + 1))
    x = list(data().values())
    both = (x, [torch.ones_like(v, dtype=torch.bool) for v in x])
    return members * records_per_second(lambda index: training.step(*take(both, index)))


def mvtcae(encoder: int) -> float:
    from multivae.data.datasets.base import MultimodalBaseDataset

    model, x = mvtcae_model(encoder).train(), data()
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step(index: Tensor) -> None:
        optimiser.zero_grad()
        model(MultimodalBaseDataset({name: v[index] for name, v in x.items()})).loss.backward()
        optimiser.step()

    return records_per_second(step)


def mvtcae_trainer(encoder: int) -> float:
    from multivae.data.datasets.base import MultimodalBaseDataset
    from multivae.trainers import BaseTrainer, BaseTrainerConfig

    settings = BaseTrainerConfig(per_device_train_batch_size=BATCH, num_epochs=1, learning_rate=LEARNING_RATE, drop_last=True)
    trainer = BaseTrainer(mvtcae_model(encoder), MultimodalBaseDataset(data()), training_config=settings)
    trainer.prepare_training()
    seconds = [cpu_seconds(lambda: trainer.train_step(1)) for _ in range(1 + REPEATS)]
    return ROWS // BATCH * BATCH / min(seconds[1:])


def mvtcae_model(encoder: int) -> nn.Module:
    """MVTCAE with its defaults but for the networks; two hidden layers everywhere."""
    from multivae.models import MVTCAE, MVTCAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn.base_architectures import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.latent_dim = SHARED
            self.layers = layers(width, encoder, 2 * SHARED)

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_variance = self.layers(x).chunk(2, -1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.latent_dim = SHARED
            self.layers = layers(SHARED, DECODER, width)

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    config = MVTCAEConfig(n_modalities=len(WIDTHS), latent_dim=SHARED, input_dims={name: (width,) for name, width in WIDTHS.items()})
    parts = ({name: part(width) for name, width in WIDTHS.items()} for part in (Encoder, Decoder))
    return MVTCAE(config, *parts)


def layers(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(ROWS, width, generator=generator) for name, width in WIDTHS.items()}


def records_per_second(step: Callable[[Tensor], object]) -> float:
    """Of the fastest of some runs after a first one: other programs on the machine only ever slow a run down."""
    batches = list(torch.randperm(ROWS).split(BATCH))

    def some_steps() -> None:
        for number in range(STEPS):
            step(batches[number % len(batches)])

    return STEPS * BATCH / min([cpu_seconds(some_steps) for _ in range(1 + REPEATS)][1:])


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


MEASUREMENTS = {
    "ours": ours,
    "ours, gaussian tails": lambda: ours(tails="gaussian"),
    "ours, 5 members side by side": lambda: ours(members=5),
    "MVTCAE, bare loop": lambda: mvtcae(HIDDEN),
    "MVTCAE, bare loop, small encoders": lambda: mvtcae(DECODER),
    "MVTCAE, its trainer": lambda: mvtcae_trainer(HIDDEN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", help="the python of the environment that has multivae")
    parser.add_argument("--measure", choices=MEASUREMENTS, help="only this, in this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(MEASUREMENTS[given.measure]())
        return
    found = {}
    for name in MEASUREMENTS:
        python = sys.executable if name.startswith("ours") else given.other
        command = [python, __file__, given.other, "--measure", name]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.splitlines()[-1])
        print(f"{name:36} {found[name]:9,.0f} records per CPU second, ours is {found['ours'] / found[name]:.2f} times that", flush=True)


if __name__ == "__main__":
    main()
