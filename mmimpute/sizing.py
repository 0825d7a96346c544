"""How large a model is made: from the settled schema and the number of training records."""

from mmimpute.data.schema import CohortSchema
from mmimpute.data.split import members_for
from mmimpute.model.config import ModalityConfig, ModelConfig
from mmimpute.spec import FitSettings


def model_config(schema: CohortSchema, rows: int, settings: FitSettings) -> ModelConfig:
    """The model's sizes and kinds, from the settled schema and the number of training records."""
    modalities = tuple(
        ModalityConfig(m.name, tuple(f.kind for f in m.features), tuple(len(f.levels) for f in m.features), m.hide, m.tails, m.noise)
        for m in schema.modalities
    )
    sizes = {"members": members_for(rows), "pattern": settings.pattern} | ({"shared": settings.z0} if settings.z0 else {})
    return ModelConfig.for_rows(modalities, rows, **sizes)
