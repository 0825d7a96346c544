"""The cohort spec and the run configuration: what a user writes in TOML, validated when it is read."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mmimpute.errors import UserError

M = TypeVar("M", bound=BaseModel)
Kind = Literal["real", "binary", "count", "ordinal", "categorical"]
SpecKind = Literal[Kind, "auto"]
Tails = Literal["gaussian", "student"]
Decoder = Literal["likelihood", "adversarial", "diffusion"]
Form = Literal["vector", "image", "signal", "text"]
Task = Literal["coherence", "quality", "likelihood", "probe", "retrieval"]
LABELLED = ("coherence", "quality", "probe")  # tasks that need a label


def modality_name(name: str) -> str:
    if not name or "__" in name:
        raise ValueError("a modality's name is not empty and has no '__' in it")
    return name


SHAPES = {"vector": "[]", "image": "[C, H, W]", "signal": "[T, C]", "text": "[T]"}


class _Settings(BaseModel):
    """Frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModalitySpec(_Settings):
    """Where a modality's features are: one list `column`, or every scalar column that starts with `prefix`."""

    column: str | None = None
    prefix: str | None = None
    features: tuple[str, ...] | None = Field(None, description="names; default: the columns' own, or f0, f1, ...")
    kinds: SpecKind | tuple[SpecKind, ...] = Field("auto", description="one for all features, or one per feature")
    levels: dict[str, tuple[str, ...] | tuple[float, ...]] = Field(
        {}, description="feature name -> allowed levels of an ordinal or categorical feature; default: those in the training data"
    )
    impute: bool = Field(True, description="false: used as an input, never imputed")
    hide: float = Field(0.5, gt=0, le=1, description="probability of hiding it in training")
    tails: Tails = Field("student", description="of its real features given the latents")
    noise: float = Field(
        0, ge=0, description="most noise expected in it, in standard deviations of each feature: how far to believe it is then learned"
    )
    decoder: Decoder = Field("likelihood", description="how its draws are made")
    form: Form = Field(
        "vector",
        description="image: C x H x W of uint8; signal: T x C of numbers, both row-major in a list `column`; text: a string column",
    )
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="of an image or signal, a tensor column has its own; text: [tokens that are read], default [64]"
    )
    vocabulary: int = Field(1000, ge=1, description="most tokens of a text that are known; those in fewer than ten records never are")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.column is None) == (self.prefix is None):
            raise ValueError("give either column (a list column) or prefix (scalar columns)")
        if self.features is not None and len(set(self.features)) != len(self.features):
            raise ValueError("feature names are not unique")
        if isinstance(self.kinds, tuple) and self.features is not None and len(self.kinds) != len(self.features):
            raise ValueError(f"{len(self.kinds)} kinds for {len(self.features)} features")
        self._check_form()
        return self

    def _check_form(self) -> None:
        dimensions = {"vector": 0, "image": 3, "signal": 2, "text": 1}[self.form]
        if self.form == "vector" and self.shape:
            raise ValueError("a shape is of an image or a signal: give its `form`")
        if self.form != "vector" and (
            self.column is None or self.features is not None or self.kinds not in ("auto", "real") or self.levels
        ):
            raise ValueError(f"a modality of form {self.form} is one `column`, without features, kinds and levels")
        if self.shape and len(self.shape) != dimensions:
            raise ValueError(f"shape {list(self.shape)}; expected {SHAPES[self.form]}")


class ContrastiveLabel(_Settings):
    """A label by which records are alike: those of one value, of one bin of values or, softly, of near values."""

    weight: float = Field(1, gt=0, description="of its loss in the linear combination")
    bins: int = Field(4, ge=2, le=100, description="of a number with more values: bins with as many people each")
    soft: bool = Field(False, description="of a number: near values are alike, by a Gaussian kernel on standardised values; no bins")


def _label(value: Any) -> Any:
    return {"weight": value} if isinstance(value, int | float) else value


class ContrastiveSpec(_Settings):
    """Pre-training on labels that are cheap: records of like labels are drawn together in latent space, and the others apart."""

    labels: dict[str, Annotated[ContrastiveLabel, BeforeValidator(_label)]] = Field(
        min_length=1, description="column -> weight, or a table; never an input to the model, and where null it says nothing"
    )
    temperature: float = Field(0.1, gt=0)
    weight: float = Field(1, gt=0, description="of the contrastive loss beside L")
    alone: bool = Field(False, description="without L: what the model imputes then comes from its other experts")
    on: Annotated[tuple[str, ...], BeforeValidator(lambda on: (on,) if isinstance(on, str) else on)] = Field(
        ("z0",), min_length=1, description="z0, or modalities: their own latents, from themselves alone; one or several"
    )


class CohortSpec(_Settings):
    """A population: which columns are what. See DESIGN, input contract."""

    subject_id: str = "subject_id"
    timestamp: str | None = Field(None, description="event time, for feature stores; never an input to the model")
    outcomes: tuple[str, ...] = Field((), description="columns (a trailing * is a wildcard) that the model never reads")
    subgroups: tuple[str, ...] = Field((), description="scalar columns (sex, age, ...) by whose groups a model card tells the accuracy")
    modalities: dict[Annotated[str, AfterValidator(modality_name)], ModalitySpec] = Field(min_length=1)
    contrastive: ContrastiveSpec | None = None

    @model_validator(mode="after")
    def _contrasted(self) -> Self:
        on = self.contrastive.on if self.contrastive else ()
        if unknown := [name for name in on if name != "z0" and name not in self.modalities]:
            raise ValueError(f"contrastive.on names {unknown[0]!r}; valid are z0 and the modalities: {', '.join(self.modalities)}")
        return self


class FitSettings(_Settings):
    """How a model is fitted. `workers=0`: one per GPU of the cluster, or one where it has none."""

    seed: int = 0
    epochs: int | None = Field(None, ge=1, description="at most; default: by the number of records")
    batch_size: int | None = Field(None, ge=8, description="records per worker and step; default: by the number of records")
    patience: int | None = Field(
        None, ge=1, description="of a single member: epochs without a better tune loss before stopping; default: half of them"
    )
    workers: int = Field(0, ge=0)
    gpus_per_worker: float = Field(0, ge=0)
    cache_share: float = Field(0.25, ge=0, le=0.9, description="of a host's memory that its workers may fill with training records")
    checkpoint_seconds: float = Field(60, ge=0, description="at most between two checkpoints, or one epoch")
    z0: int | None = Field(None, ge=1, description="width of the shared latent")
    warm_start: bool = Field(False, description="start from the champion's weights, where its sizes and kinds are the same")
    pattern: bool = Field(
        True, description="the pattern of missing modalities is an input of q(z0): models data that are missing not at random"
    )


class GateSettings(_Settings):
    """When a challenger takes the champion's place: it is better beyond noise, and worse nowhere beyond a tolerance.

    Losses are shares of what the column mean loses (1 - skill), so 0.01 is one point of skill.
    """

    tolerance: float = Field(0.01, ge=0, description="by how much the loss of any one modality or outcome may grow")
    likelihood_tolerance: float = Field(0.05, ge=0, description="by how many nats a value a modality's log-likelihood may fall")
    calibration_tolerance: float = Field(
        0.02, ge=0, description="by how much a modality's calibration error may grow: |share inside 90% intervals - 0.9|, or ECE of codes"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="of the two-sided interval of the overall gain, which has to lie above 0")
    resamples: int = Field(2000, ge=100, description="of the subjects, to find that interval (paired bootstrap)")
    seed: int = 0


class EvaluateSettings(_Settings):
    """What a model is asked besides imputation; see `tasks`."""

    tasks: tuple[Task, ...] = ()
    label: str | None = Field(None, description="column of classes that the model never reads: what coherence, quality and probe are about")

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.label is None and (lacking := [t for t in self.tasks if t in LABELLED]):
            raise ValueError(f"{', '.join(lacking)}: give label, an outcome column of a few classes")
        return self


class ImputeSettings(_Settings):
    """What is written into the enriched shards."""

    interval: Literal[0, 0.5, 0.8, 0.9, 0.95] = Field(  # type: ignore[valid-type]
        0, description="X__lower, X__upper: interval of this coverage for numbers; 0 = none"
    )
    draws: int = Field(0, ge=0, description="X__draws: number of draws of what is missing; 0 = none")
    latent: bool = Field(False, description="z0: the shared latent mean, an embedding of the record")
    seed: int = 0
    head: str | None = Field(None, description="X__probability: URL of a head that `mmimpute finetune` wrote for this model")


class FinetuneSettings(_Settings):
    """A head on a model's z0 for labels that are dear. Where a label is null a record says nothing of it."""

    target: tuple[str, ...] = Field(min_length=1, description="columns of classes: 0 and 1, or one of several values; no inputs")
    full: bool = Field(False, description="true: the encoder is trained too, with modalities hidden at random")
    class_weight: Literal["balanced"] | None = Field(
        None, description="balanced: every class weighs the same, and probabilities are no longer frequencies"
    )
    epochs: int = Field(40, ge=1, description="at most, of a full one")
    lr: float = Field(2e-4, gt=0, description="largest rate of a full one")
    most: int = Field(20_000, ge=100, description="labelled records that are used")
    seed: int = 0


class DriftSettings(_Settings):
    """From when on a drop of new shards counts as drifted. What chance may explain never does, so small drops need more."""

    psi: float = Field(
        0.25, gt=0, description="population stability index of a feature, or of the pattern of missing modalities; 0.25: a large shift"
    )
    psi_moderate: float = Field(0.1, gt=0, description="the same for a moderate shift, which is drift where many features have it")
    features: float = Field(0.2, gt=0, le=1, description="share of the features beyond which moderate shifts are drift")
    missing: float = Field(
        0.05, gt=0, le=1, description="change of the share of records that lack a modality, or of its records that lack one of its values"
    )
    unseen: float = Field(0.01, gt=0, le=1, description="share of a feature's values that are of no level or code seen in training")
    score: float = Field(
        0.25, gt=0, description="change of a hidden modality's mean log score, in standard deviations between training records"
    )


class ClusterSettings(_Settings):
    """Where Ray runs. No address: a local one that ends with the run."""

    address: str | None = None
    cpus: int | None = Field(None, ge=1, description="of a local Ray; default: all")
    actors: int = Field(0, ge=0, description="imputing actors; 0 = one per CPU (or per GPU)")
    gpus_per_actor: float = Field(0, ge=0)


class Condition(_Settings):
    """What a value has to be: exactly one of them."""

    at_least: float | None = None
    at_most: float | None = None
    equals: float | str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(bound is not None for bound in (self.at_least, self.at_most, self.equals)) != 1:
            raise ValueError("give one of at_least, at_most and equals")
        return self


class Rule(Condition):
    """Whom an alert is about: those for whom the condition holds of `feature` with more than this probability."""

    feature: str = Field(description="a scalar column such as glyco__hba1c, or rna[ESR1] in a list column")
    probability: float = Field(gt=0, lt=1)
    not_observed: bool = Field(True, description="only people for whom the feature is not on record; false: observed values count too")
    where: dict[str, Condition] = Field({}, description="feature or scalar column -> what its value on record has to be")
    message: str = ""


class AlertRules(_Settings):
    """A rule file: `[rules.<name>]`."""

    rules: dict[str, Rule] = Field(min_length=1)


class RunConfig(_Settings):
    """One population-scale run: shards in, a model, enriched shards and a report out."""

    title: str = "cohort"
    spec: CohortSpec
    shards: str
    model: str
    output: str
    prune: bool = Field(False, description="what was made from inputs that are gone leaves the table")
    retrain: bool = Field(True, description="new data: fit a challenger and let the gate decide; false: the champion imputes them as it is")
    growth: float = Field(0.2, gt=0, description="of records since the champion was trained, from which on retraining is asked for")
    alerts: AlertRules | None = Field(None, description="rules that are held against the enriched table: a path or a table")
    alerts_to: str | None = Field(None, description="URL of the table of outreach lists, with subject ids")
    fit: FitSettings = FitSettings()
    gate: GateSettings = GateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    impute: ImputeSettings = ImputeSettings()
    drift: DriftSettings = DriftSettings()
    finetune: FinetuneSettings | None = Field(None, description="for `mmimpute finetune`; no part of a run")
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="after")
    def _list_has_a_place(self) -> Self:
        if (self.alerts is None) != (self.alerts_to is None):
            raise ValueError("give both of alerts and alerts_to, or neither")
        return self


def read_spec(path: str | Path) -> CohortSpec:
    """The cohort spec in a TOML file. Raises UserError that says where and what is allowed."""
    return validated(CohortSpec, _toml(path), str(path))


def read_rules(path: str | Path) -> AlertRules:
    """The alert rules in a TOML file. Raises UserError that says where and what is allowed."""
    return validated(AlertRules, _toml(path), str(path))


def read_toml(model: type[M], path: str | Path) -> M:
    """Settings of another kind in a TOML file. Raises UserError that says where and what is allowed."""
    return validated(model, _toml(path), str(path))


def read_config(path: str | Path) -> RunConfig:
    """A run configuration. `spec` and `alerts` may be paths, relative to the file, in place of tables."""
    values = _toml(path)
    for key, read in (("spec", read_spec), ("alerts", read_rules)):
        if isinstance(values.get(key), str):
            values[key] = read(Path(path).parent / values[key])
    return validated(RunConfig, values, str(path))


def _toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None


def validated(model: type[M], values: dict[str, Any], where: str) -> M:
    """Settings that a user wrote. Raises UserError that says where and what is allowed."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(model, e) for e in error.errors(include_url=False, include_input=False)]
        raise UserError("\n".join(f"{where}: {p}" for p in problems)) from None


def _explain(model: type[BaseModel], error: ErrorDetails) -> str:
    at = ".".join(map(str, error["loc"])) or "file"
    if error["type"] == "extra_forbidden":
        valid = _model_at(model, error["loc"][:-1]).model_fields
        return f"unknown key {at!r}; valid keys here: {', '.join(valid)}"
    return f"{at}: {error['msg'].removeprefix('Value error, ')}"


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class that a location inside a TOML file belongs to."""
    for key in loc:
        if field := model.model_fields.get(str(key)):
            inner = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
            model = inner[0] if inner else model
    return model
