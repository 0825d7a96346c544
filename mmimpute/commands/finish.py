"""How a command over shards ends."""

import typer

from mmimpute.console import console, set_aside_table


def finish(set_aside: dict[str, str]) -> None:
    """Good shards are done; bad ones are named, and the exit code says so."""
    if set_aside:
        console.print(set_aside_table([{"shard": s, "error": e} for s, e in set_aside.items()]))
        raise typer.Exit(3)
