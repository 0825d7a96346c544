"""`mmimpute store`: the embedded object store."""

from pathlib import Path
from typing import Annotated

import typer

from mmimpute.commands.options import DEFAULT_HOME
from mmimpute.console import console

store_app = typer.Typer(no_args_is_help=True, help="The embedded object store: a real S3 server on this machine.")
StoreFolder = Annotated[Path, typer.Option(help="where the store keeps its data, credentials and log")]


@store_app.command()
def start(folder: StoreFolder = DEFAULT_HOME / "store") -> None:
    """Start the store, or find it running, and print the variables that clients need.

    Example: eval "$(mmimpute store start)"
    """
    from mmimpute import store

    for name, value in store.start(folder).environment().items():
        print(f"export {name}={value}")


@store_app.command()
def stop(folder: StoreFolder = DEFAULT_HOME / "store") -> None:
    """Stop the store; its data stay.

    Example: mmimpute store stop
    """
    from mmimpute import store

    console.print("stopped" if store.stop(folder) else "was not running")


@store_app.command()
def status(folder: StoreFolder = DEFAULT_HOME / "store") -> None:
    """Say whether the store runs, and where. Exit code 1 where it does not.

    Example: mmimpute store status
    """
    from mmimpute import store

    endpoint = store.status(folder)
    console.print(f"running at {endpoint.url}" if endpoint else "not running")
    if endpoint is None:
        raise typer.Exit(1)
