"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

ModelUrl = Annotated[str, typer.Option(help="URL of the model, as given to `mmimpute fit`")]
Address = Annotated[str | None, typer.Option(help="address of a Ray cluster; default: a local one")]
TABLE_HELP = "URL of the table, as given to `mmimpute impute --output`"
DEFAULT_HOME = Path(".mmimpute")


def _in_a_folder(file: Path | None) -> Path | None:
    """Told before the job, which may take hours."""
    if file and not file.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {file.parent}")
    return file


def written(what: str) -> OptionInfo:
    """The option of a file that a command writes; what: its help."""
    return typer.Option(help=what, dir_okay=False, writable=True, callback=_in_a_folder)
