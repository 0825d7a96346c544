"""How large a model is made: from the settled schema and the number of training records."""

from mmimpute.data.schema import CohortSchema, Modality
from mmimpute.data.split import members_for
from mmimpute.model.config import ModalityConfig, ModelConfig
from mmimpute.spec import FitSettings


def model_config(schema: CohortSchema, rows: int, settings: FitSettings) -> ModelConfig:
    """The model's sizes and kinds, from the settled schema and the number of training records."""
    modalities = modality_configs(schema)
    members = 1 if any(m.structured for m in modalities) else members_for(rows)
    sizes = {"members": members, "pattern": settings.pattern} | ({"shared": settings.z0} if settings.z0 else {})
    return ModelConfig.for_rows(modalities, rows, **sizes)


def modality_configs(schema: CohortSchema) -> tuple[ModalityConfig, ...]:
    """What a model of this cohort has to be made for."""
    return tuple(map(_modality, schema.modalities))


def _modality(m: Modality) -> ModalityConfig:
    """One modality; every place of a text has the levels of its vocabulary and no token."""
    levels = tuple(len(m.chances) if m.form == "text" else len(f.levels) for f in m.features)
    rest = {"hide": m.hide, "tails": m.tails, "noise": m.noise, "decoder": m.decoder}
    rest |= {"form": m.form, "shape": m.shape, "chances": m.chances}
    return ModalityConfig(m.name, tuple(f.kind for f in m.features), levels, **rest)
