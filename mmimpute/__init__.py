"""Multi-modal imputation of patient records at population scale.

    from mmimpute import MultiModalImputer, read

`MultiModalImputer` completes a table in memory, `read` an enriched table in storage; the command `mmimpute` does the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmimpute.estimator import MultiModalImputer
    from mmimpute.reading import read

__version__ = "0.1.0"
__all__ = ["MultiModalImputer", "__version__", "read"]
_PLACES = {"MultiModalImputer": "mmimpute.estimator", "read": "mmimpute.reading"}


def __getattr__(name: str) -> Any:
    """torch and pyarrow are imported when something needs them, not by `import mmimpute`."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mmimpute' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
