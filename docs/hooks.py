"""What the site makes from the code: the command line's help, and the fields of the files that a user writes."""

import re
import typing

import typer
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from mmimpute import cli, spec
from mmimpute.standards import features

FIELDS = re.compile(r"^::fields (\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    markdown = FIELDS.sub(lambda found: fields(getattr(spec, found[1], None) or getattr(features, found[1])), markdown)
    return markdown.replace("::commands", commands()) if "::commands" in markdown else markdown


def commands() -> str:
    """Every command's help, as `typer utils docs` writes it; the examples as code."""
    command = typer.main.get_command(cli.app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="mmimpute", indent=1)
    text = re.sub(r"^Example: (.+)$", r"```sh\n\1\n```", text, flags=re.MULTILINE)
    return text.replace("\\[", "[")


def fields(model: type[BaseModel]) -> str:
    """A table of a settings class: key, type, default, meaning."""
    rows = [f"| `{name}` | {_type(f.annotation)} | {_default(f)} | {f.description or ''} |" for name, f in model.model_fields.items()]
    return "\n".join([typing.cast(str, model.__doc__).strip(), "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _type(annotation: object) -> str:
    """Without module names; `|` would end a table's cell."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"\w+\.(?=\w)", "", re.sub(r"Annotated\[([\w.]+), .*\)\]", r"\1", text))
    return "`" + text.replace(" | ", " or ").replace("|", "or") + "`"


def _default(field: typing.Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return f"`[{type(value).__name__}]`" if isinstance(value, BaseModel) else "–" if value in (None, (), {}) else f"`{value!r}`"
