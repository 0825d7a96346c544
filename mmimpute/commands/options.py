"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

ModelUrl = Annotated[str, typer.Option(help="URL of the model, as given to `mmimpute fit`")]
Address = Annotated[str | None, typer.Option(help="address of a Ray cluster; default: a local one")]
TABLE_HELP = "URL of the table, as given to `mmimpute impute --output`"
DEFAULT_HOME = Path(".mmimpute")
