"""The documentation: its guides run as they stand, the site is built without a warning, and it asks no other host for anything."""

import ast
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token
from nbclient import NotebookClient
from typer.testing import CliRunner

import mmimpute
from mmimpute import spec
from mmimpute.cli import app
from mmimpute.cluster import runtime
from mmimpute.spec import ClusterSettings
from mmimpute.standards.features import FeatureSpec

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WITH_RAY = ("own-shards.md", "drift.md")  # in this order, in one folder
GUIDES = ["index.md", *sorted(f"guides/{p.name}" for p in (DOCS / "guides").glob("*.md") if p.name not in WITH_RAY)]
KINDS = {"rules": spec.AlertRules, "shards": spec.RunConfig, "min_subjects": FeatureSpec}
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])


def blocks(page: Path) -> list[Token]:
    return [token for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]


def command_lines(block: Token) -> list[list[str]]:
    """The words of each line of a shell block."""
    return [words for line in block.content.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def run_page(page: Path, names: dict) -> list[str]:
    """Runs a page's code in order: python blocks in one namespace, `mmimpute` lines of bash blocks in this process; a block with a title
    is the file of this name. Blocks of other languages (sh, toml without a title) are not run.
    Returns what the commands printed."""
    printed = []
    for block in blocks(page):
        if title := re.search(r'title="(.+?)"', block.info):
            Path(title[1]).write_text(block.content)
        elif block.info == "python":
            code = "\n" * (block.map[0] + 1) + block.content  # so that a traceback names the page's line
            exec(compile(code, str(page), "exec"), names)
        elif block.info == "bash":
            for words in command_lines(block):
                assert words[0] == "mmimpute", words
                done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
                assert done.exit_code == 0, (words, done.output)
                printed.append(done.output)
    return printed


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / guide, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_their_options_exist(page):
    """Of those blocks too that are not run."""
    for words in (w for block in blocks(page) if block.info in ("bash", "sh") for w in command_lines(block) if "mmimpute" in w):
        words = words[words.index("mmimpute") + 1 :]
        root = command = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", ()):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert command is not root and not [w for w in words if w.startswith("--") and w not in known], (command.name, words)


def test_files_that_are_shown_are_valid():
    """Every TOML block is a spec, a feature spec, a rule file or a run's file."""
    shown = [tomllib.loads(block.content) for page in PAGES for block in blocks(page) if block.info == "toml"]
    for found in shown:
        kind = next((kind for key, kind in KINDS.items() if key in found), spec.CohortSpec)
        whole = found | ({"spec": {"modalities": {"rna": {"column": "rna"}}}} if kind is spec.RunConfig else {})
        spec.validated(kind, whole, "the block")
    assert len(shown) >= 4


@pytest.mark.parametrize("notebook", sorted(p.name for p in (DOCS / "notebooks").glob("*.ipynb")))
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    read = nbformat.read(DOCS / "notebooks" / notebook, 4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read.cells), "strip the outputs"
    NotebookClient(read, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.services
def test_the_guides_of_the_command_line_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with runtime.cluster(ClusterSettings(cpus=2)):
        shards, drift = (run_page(DOCS / "guides" / guide, names) for guide in WITH_RAY)
    assert "all is well" in "".join(shards)
    assert "drifted: fit the model anew" in drift[0] and "hba1c has another distribution" in drift[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; a warning is an error (`strict`; with `--quiet` none is counted)."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_other_hosts(site):
    """No element of any page fetches from elsewhere; links may lead there."""
    loaded = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)")
    found = {(page.name, url) for page in site.rglob("*.html") for url in loaded.findall(page.read_text())}
    assert not {entry for entry in found if not entry[1].startswith("https://example.org")}


def test_the_reference_is_complete(site):
    """Public names, every command, every key of the files that a user writes."""
    python, files, cli = ((site / "reference" / name / "index.html").read_text() for name in ("python", "files", "cli"))
    assert [name for name in mmimpute.__all__ if name != "__version__" and f"mmimpute.{name}" not in python] == []
    settings = [c for c in vars(spec).values() if isinstance(c, type) and issubclass(c, spec._Settings) and c.model_fields]
    keys = {key for c in settings if c is not spec.AlertRules for key in c.model_fields}
    assert [key for key in keys if f"<code>{key}</code>" not in files] == [] and " at 0x" not in files
    commands = typer.main.get_command(app).commands
    assert len(commands) > 10 and [name for name in commands if f"mmimpute {name}</code>" not in cli] == []


def test_the_readme_leads_to_what_is_there():
    """Its links, and its figures: each row of a table of measurements stands in the benchmarks' page too."""
    readme = (ROOT / "README.md").read_text()
    assert [link for link in re.findall(r"\]\((?!http|#)([^)#]+)", readme) if not (ROOT / link).exists()] == []
    measured = readme[readme.index("## Measured") : readme.index("## Limits")]
    benchmarks = (DOCS / "benchmarks.md").read_text()
    assert [row for row in measured.splitlines() if row.startswith("|") and row not in benchmarks] == []


def test_pictures_are_drawn_by_their_script(tmp_path, monkeypatch):
    drawing = runpy.run_path(str(DOCS / "pictures.py"))
    for name in ("modalities", "model", "engine", "flow"):
        assert drawing[name]() == (DOCS / "images" / f"{name}.svg").read_text(), f"run docs/pictures.py: {name} is not as it draws it"


# --- errors ----------------------------------------------------------------------------------------------------------------------------

QUOTED = re.findall(r"^### `+ ?(.+?) ?`+$", (DOCS / "operate" / "errors.md").read_text(), re.MULTILINE)


def pattern(node: ast.expr | None) -> str:
    """What a string expression may say: constants as they are, anything for the rest."""
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value)) if node.value is not None else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(pattern, node.values))
    return ".*"


def said(node: ast.AST) -> str | None:
    """The message of an error that is made here, or of a returned sentence."""
    if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):
        return pattern(node.value)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return None
    if node.func.id == "DataError":
        _, column, *rest = node.args
        where = "shard .*" if isinstance(column, ast.Constant) and column.value is None else "shard .*, column .*"
        return f"{where}: found {pattern(rest[0])}; expected {pattern(rest[1])}; {pattern(rest[2])}"
    return pattern(node.args[0]) if node.func.id in ("UserError", "Unreachable", "ValueError") else None


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Patterns of all messages of the package that have words of their own."""
    trees = [ast.parse(path.read_text()) for folder in ("mmimpute", "flows") for path in (ROOT / folder).rglob("*.py")]
    found = {text for tree in trees for node in ast.walk(tree) if (text := said(node))}
    return [text for text in found if len(text.replace(".*", "")) > 12]


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_error_is_still_in_the_source(message, messages):
    assert any(re.fullmatch(text, message, re.DOTALL) for text in messages)
