"""What a model is made of: frozen, checked when it is built, written next to the weights as JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("real", "binary", "count", "ordinal", "categorical")
NUMBERS = ("real", "count", "ordinal")  # whose mean means something: they are regressed as standardised values
TAILS = ("gaussian", "student")
FORMS = {"vector": 0, "image": 3, "signal": 2, "text": 1}  # and the dimensions of their shape
MOST_LEVELS = 1 << 16  # of a feature, or words of a text: far more than anybody has, and few enough for any memory
MOST_MEMBERS = 32
MOST_LAYERS = 32
DECODERS = ("likelihood", "adversarial", "diffusion")


def _check_keys(cls: type, found: Mapping[str, Any]) -> None:
    valid = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(found) - set(valid))
    if unknown:
        raise ValueError(f"{cls.__name__}: unknown keys {unknown}; valid keys are {valid}")


@dataclass(frozen=True)
class ModalityConfig:
    """One modality: a kind per feature, a number of levels per ordinal or categorical one (values 0..levels-1)."""

    name: str
    kinds: tuple[str, ...]
    levels: tuple[int, ...] = ()
    hide: float = 0.5  # how readily training hides it, relative to the other modalities
    tails: str = "student"  # of p(xj | zj, z0) of real features; see likelihoods.py
    noise: float = 0.0  # most noise that is expected in it, in sds of each feature; see reliability.py
    decoder: str = "likelihood"  # how draws are made; see adversarial.py and diffusion.py
    form: str = "vector"  # images, signals and texts have networks of their own and are the VAE's alone; see forms.py, text.py
    shape: tuple[int, ...] = ()  # image: C, H, W; signal: T, C; its values are row-major; text: T tokens, as ids of which 0 is none
    chances: tuple[float, ...] = ()  # text: share of each level among all tokens of the training texts

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        object.__setattr__(self, "levels", tuple(int(n) for n in self.levels) or (0,) * len(self.kinds))
        if not self.kinds:
            raise ValueError(f"modality {self.name!r} has no features")
        wrong = sorted(set(self.kinds) - set(KINDS))
        if wrong:
            raise ValueError(f"modality {self.name!r}: unknown kinds {wrong}; valid kinds are {list(KINDS)}")
        if len(self.levels) != len(self.kinds):
            raise ValueError(f"modality {self.name!r}: {len(self.levels)} levels for {len(self.kinds)} features")
        if any(n < 2 for n, k in zip(self.levels, self.kinds, strict=True) if k in ("ordinal", "categorical")):
            raise ValueError(f"modality {self.name!r}: ordinal and categorical features need at least 2 levels")
        if max(self.levels) > MOST_LEVELS:
            raise ValueError(f"modality {self.name!r}: {max(self.levels)} levels, expected at most {MOST_LEVELS}")
        if not 0 < self.hide <= 1:
            raise ValueError(f"modality {self.name!r}: hide is {self.hide}, expected a value in (0, 1]")
        if self.noise < 0:
            raise ValueError(f"modality {self.name!r}: noise is {self.noise}, expected 0 or more")
        if self.tails not in TAILS:
            raise ValueError(f"modality {self.name!r}: unknown tails {self.tails!r}; valid ones are {list(TAILS)}")
        if self.decoder not in DECODERS:
            raise ValueError(f"modality {self.name!r}: unknown decoder {self.decoder!r}; valid ones are {list(DECODERS)}")
        self._check_form()

    def _check_form(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.form not in FORMS:
            raise ValueError(f"modality {self.name!r}: unknown form {self.form!r}; valid ones are {list(FORMS)}")
        object.__setattr__(self, "chances", tuple(map(float, self.chances)))
        kind = "categorical" if self.form == "text" else "real"
        fits = not self.structured or (math.prod(self.shape) == self.width and set(self.kinds) == {kind})
        if len(self.shape) != FORMS[self.form] or not fits:
            raise ValueError(f"modality {self.name!r}: shape {list(self.shape)} is not that of a {self.form} of {self.width} values")
        if self.form == "text" and (set(self.levels) != {len(self.chances)} or min(self.chances) <= 0):
            raise ValueError(f"modality {self.name!r}: a text has one vocabulary, and a chance of every token in it")

    @property
    def structured(self) -> bool:
        return self.form != "vector"

    @property
    def convolved(self) -> bool:
        """Its networks are convolutional; see forms.py."""
        return self.form in ("image", "signal")

    @property
    def width(self) -> int:
        return len(self.kinds)

    @property
    def private(self) -> int:
        """Size of the private latent: grows with the square root of the width, 4 to 32."""
        return min(32, max(4, 2 * math.ceil(math.sqrt(self.width))))


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and objective. The defaults were chosen out of fold on three cohorts (see objective.py).

    pattern, on the simulated population of 6,000 (`tests/benchmarks/pattern.py`): R2 of what is missing .427 with and without it where
    that is at random, .384 with it and .385 without where it is not; an oracle gains .003 from it (.528 -> .531).
    """

    modalities: tuple[ModalityConfig, ...]
    members: int = 1  # trained side by side, each without its own fold; 1 with images, signals or texts, whose networks are for one
    shared: int = 64  # size of z0
    hidden: int = 256  # width of the trunk of q(z0 | x)
    layers: int = 2  # hidden ones, of the trunk
    decoder: int = 128  # width of the private encoders and decoders
    dropout: float = 0.2  # of the trunk; the decoders have the noise of their latents
    piecewise_limit: int = 64  # modalities up to this width get the piecewise-linear encoding
    elbo_weight: float = 0.03  # weight of L_elbo in the objective, L_impute's being 1
    elbo_share: float = 0.25  # share of a training batch on which L_elbo is estimated
    impute_draws: int = 2  # latent draws per record in L_impute, in antithetic pairs
    hide_one: float = 0.8  # probability that exactly one modality is hidden
    drop_values: float = 0.15  # share of training records of which the encoders see only a part of the values
    pattern: bool = True  # what is missing is an input
    pair_weight: float = 0.1  # weight of the score of pairs of features, which trains their dependence

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", tuple(self.modalities))
        names = [m.name for m in self.modalities]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"expected at least one modality, with different names; found {names}")
        if self.impute_draws < 2 or self.impute_draws % 2:
            raise ValueError(f"impute_draws is {self.impute_draws}, expected an even number, 2 or more")
        if not 1 <= self.layers <= MOST_LAYERS:
            raise ValueError(f"layers is {self.layers}, expected 1 to {MOST_LAYERS}")
        if not 1 <= self.members <= MOST_MEMBERS:
            raise ValueError(f"members is {self.members}, expected 1 to {MOST_MEMBERS}")
        if self.members > 1 and self.structured:
            raise ValueError(f"members is {self.members}, expected 1 with images, signals or texts")

    @property
    def structured(self) -> bool:
        """With images, signals or texts."""
        return any(m.structured for m in self.modalities)

    @classmethod
    def for_rows(cls, modalities: tuple[ModalityConfig, ...], rows: int, **sizes: Any) -> "ModelConfig":
        """The default for a number of training rows: a small cohort leans on the generative model and on dropout, and so do images,
        signals and texts, whose values only make sense together (see forms.py). Many records bear a wider trunk, less dropout and, since
        batches are larger, a higher rate (`training.optimiser`).

        R2 short of the oracle's, mean of three modalities of 200,000 simulated records, VAE alone after 2,000 steps of 1,024: 256 wide,
        dropout .2, rate 2e-3 .0177; without dropout .0174; and rate 4e-3 .0149; and 512 wide .0126, 1,024 wide (3e-3) .0113 in 1.7 times
        the time; 512 wide with dropout .1 .0136, 3,000 steps .0123 (without dropout 4,000 steps fit too much: .0131). One member's skill
        on 20% of 50,000 people of diabetes130, 2,000 steps: .2107 as at first; 512 wide at 4e-3 .2070, .2128, .2120 with dropout 0, .1,
        .2; 1,024 wide .2110. Where no record comes back often there is nothing to fit too much: 1,000,000 simulated records,
        3,000 steps: 512 wide with dropout .1 .0137; without .0119; and 3 hidden layers .0086, 4 .0088, 3 at rate 6e-3 .0088; squared errors
        in the place of the CRPS .0096, with 3 layers .0091. The whole model, 5,000 steps, 256 features: only .0070 -> .0067. 3 layers on
        diabetes130 .2128 -> .2094, and on nhanes (five members) .2754 -> .2749.
        """
        structured = any(m.structured for m in modalities)
        small = {"dropout": 0.4, "elbo_weight": 0.3} if rows < 2_500 else {}
        many = {"dropout": 0.1, "hidden": 512} if rows >= 50_000 and not structured else {}
        most = {"dropout": 0.0, "layers": 3} if rows >= 500_000 and not structured else {}
        whole = {"elbo_weight": 0.1, "elbo_share": 0.5, "impute_draws": 4} if structured else {}
        return cls(modalities, **(small | many | most | whole | sizes))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of dataclasses.asdict, also after a trip through JSON."""
        _check_keys(cls, found)
        for m in found["modalities"]:
            _check_keys(ModalityConfig, m)
        return cls(**{**found, "modalities": tuple(ModalityConfig(**m) for m in found["modalities"])})
