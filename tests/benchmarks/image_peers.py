"""A model of the MultiVae library on a cohort of five views; `images.py` runs this with the Python of the library's own environment.

    OTHER/bin/python tests/benchmarks/image_peers.py MVTCAE data.npz made.npz --epochs 10 --likelihood 16

data.npz: train N x 5 x 3 x 28 x 28 uint8, present N x 5, test M x 5 x 3 x 28 x 28. Writes what the model generates, as `coherence.Made`
has it, and prints seconds per epoch, parameters, and the mean log-likelihood of some test records as the library estimates it (1,000
importance samples; nats of pixels in [0, 1] under the model's own decoder density). Settings are those of the library's examples for
PolyMNIST, but for 64 latent variables in all where MVTCAE and MoPoE have 512 there, and for the networks, which are as large as ours:
two strided convolutions of 32 and 64 channels to a code of 128, mirrored in the decoder. Generated images are the decoder's mean, as
in the library's own evaluators.
"""

import argparse
import json
import time

import numpy as np
import torch
from multivae.data.datasets.base import IncompleteDataset, MultimodalBaseDataset
from multivae.models import CMVAE, MVTCAE, CMVAEConfig, MMVAEPlus, MMVAEPlusConfig, MoPoE, MoPoEConfig, MVTCAEConfig
from multivae.models.nn.base_architectures import BaseMultilatentEncoder
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn.base_architectures import BaseDecoder
from torch import Tensor, nn

BATCH, LEARNING_RATE, SAMPLES = 128, 1e-3, 1_000
CODE = 128
SHARED, PRIVATE = 32, 32  # or 64 shared ones
VIEWS = [f"m{j}" for j in range(5)]
COMMON = {
    "n_modalities": 5,
    "input_dims": dict.fromkeys(VIEWS, (3, 28, 28)),
    "decoders_dist": dict.fromkeys(VIEWS, "laplace"),
    "decoder_dist_params": {v: {"scale": 0.75} for v in VIEWS},
}
SPLIT = {"latent_dim": SHARED, "modalities_specific_dim": PRIVATE, "K": 1, "beta": 2.5, "loss": "iwae_looser"}
WHOLE = {"latent_dim": SHARED + PRIVATE, "beta": 2.5}
MODELS = {
    "MVTCAE": lambda: MVTCAE(MVTCAEConfig(**COMMON, **WHOLE, alpha=5 / 6), *networks(SHARED + PRIVATE, 0)),
    "MoPoE": lambda: MoPoE(MoPoEConfig(**COMMON, **WHOLE), *networks(SHARED + PRIVATE, 0)),
    "MMVAE+": lambda: MMVAEPlus(MMVAEPlusConfig(**COMMON, **SPLIT), *networks(SHARED, PRIVATE)),
    "CMVAE": lambda: CMVAE(CMVAEConfig(**COMMON, **SPLIT, number_of_clusters=40), *networks(SHARED, PRIVATE)),
}


class Encoder(BaseMultilatentEncoder):
    """3 x 28 x 28 -> means and log variances of the shared and, if there are any, the private latent variables."""

    def __init__(self, shared: int, private: int) -> None:
        super().__init__()
        self.latent_dim, self.style_dim = shared, private
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, CODE),
            nn.SiLU(),
        )
        sizes = {"embedding": shared, "log_covariance": shared, "style_embedding": private, "style_log_covariance": private}
        self.heads = nn.ModuleDict({name: nn.Linear(CODE, size) for name, size in sizes.items() if size})

    def forward(self, x: Tensor) -> ModelOutput:
        body = self.body(x)
        return ModelOutput(**{name: head(body) for name, head in self.heads.items()})


class Decoder(BaseDecoder):
    def __init__(self, latent: int) -> None:
        super().__init__()
        self.latent_dim = latent
        self.layers = nn.Sequential(
            nn.Linear(latent, 64 * 7 * 7),
            nn.SiLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.SiLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.layers(z))


def networks(shared: int, private: int) -> tuple[dict, dict]:
    return {v: Encoder(shared, private) for v in VIEWS}, {v: Decoder(shared + private) for v in VIEWS}


def train(model: nn.Module, x: np.ndarray, present: np.ndarray, epochs: int) -> list[float]:
    """Returns the seconds of each epoch."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, amsgrad=True)
    seconds = []
    for _ in range(epochs):
        began = time.perf_counter()
        for index in torch.randperm(len(x)).split(BATCH):
            if len(index) < BATCH:
                continue
            optimiser.zero_grad()
            model(batch(x[index], present[index])).loss.backward()
            optimiser.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def batch(x: np.ndarray, present: np.ndarray) -> MultimodalBaseDataset:
    data, masks = pixels(x), {v: torch.from_numpy(present[:, j]) for j, v in enumerate(VIEWS)}
    return MultimodalBaseDataset(data) if present.all() else IncompleteDataset(data, masks)


def pixels(x: np.ndarray) -> dict[str, Tensor]:
    return {v: torch.from_numpy(x[:, j]).float() / 255 for j, v in enumerate(VIEWS)}


@torch.no_grad()
def generate(model: nn.Module, x: np.ndarray) -> dict[str, np.ndarray]:
    """Each view from one other, each from all others, and synthetic records, as many as there are records."""
    size = (len(x), *x.shape[2:])
    made = {"one": np.zeros((5, 5, *size), np.uint8), "others": np.zeros((5, *size), np.uint8), "joint": np.zeros((5, *size), np.uint8)}
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        inputs = MultimodalBaseDataset(pixels(x[rows]))
        for i, source in enumerate(VIEWS):
            said = model.predict(inputs, [source], "all")
            others = model.predict(inputs, [v for v in VIEWS if v != source], [source])
            made["others"][i, rows] = bytes_of(others[source])
            for j, view in enumerate(VIEWS):
                made["one"][i, j, rows] = bytes_of(said[view])
        joint = model.decode(model.generate_from_prior(len(x[rows])))
        for j, view in enumerate(VIEWS):
            made["joint"][j, rows] = bytes_of(joint[view])
    return made


def bytes_of(images: Tensor) -> np.ndarray:
    return (255 * images.clamp(0, 1)).round().to(torch.uint8).numpy()


def log_likelihood(model: nn.Module, x: np.ndarray) -> float:
    total = 0.0
    for record in np.split(x, len(x)):
        inputs = pixels(record)
        if isinstance(model, MMVAEPlus):
            inputs["popped"] = inputs["m4"]  # MultiVae 1.0.3 counts the records by taking the last modality out
        total -= float(model.compute_joint_nll(MultimodalBaseDataset(inputs), K=SAMPLES))
    return total / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("data")
    parser.add_argument("made")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--likelihood", type=int, default=16, help="test records to estimate the likelihood of")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # MultiVae chooses the modality to condition on with it
    with np.load(given.data) as data:
        x, present, test = data["train"], data["present"], data["test"]
    model = MODELS[given.model]()
    seconds = train(model.train(), x, present, given.epochs)
    np.savez(given.made, **generate(model.eval(), test))
    found = {
        "seconds_per_epoch": float(np.median(seconds)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "log_likelihood": log_likelihood(model, test[: given.likelihood]),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
