"""The layers of DESIGN: an import may only go down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top; a module may import from its own layer and those below.
LAYERS = [
    ("flows",),
    ("mmimpute.cli",),
    ("mmimpute.commands",),
    ("mmimpute.demo",),
    ("mmimpute.launch",),
    ("mmimpute.population",),
    ("mmimpute.retraining",),
    ("mmimpute.jobs", "mmimpute.runs", "mmimpute.drops", "mmimpute.reading", "mmimpute.ingesting", "mmimpute.plots"),
    ("mmimpute.cluster",),
    ("mmimpute.estimator",),
    ("mmimpute.tasks",),
    (
        "mmimpute.training",
        "mmimpute.stacking",
        "mmimpute.denoising",
        "mmimpute.imputing",
        "mmimpute.metrics",
        "mmimpute.exporting",
        "mmimpute.standards.export",
        "mmimpute.features",
        "mmimpute.verifying",
        "mmimpute.generating",
        "mmimpute.simulating",
        "mmimpute.evaluation",
        "mmimpute.gate",
        "mmimpute.card",
        "mmimpute.scoring",
        "mmimpute.drift",
        "mmimpute.rubin",
        "mmimpute.outcomes",
        "mmimpute.downstream",
        "mmimpute.studying",
        "mmimpute.alerts",
        "mmimpute.finetuning",
        "mmimpute.report",
    ),
    ("mmimpute.heads",),
    ("mmimpute.standards",),
    ("mmimpute.registry", "mmimpute.planning", "mmimpute.drafting", "mmimpute.sizing"),
    ("mmimpute.data",),
    ("mmimpute.model", "mmimpute.simulation"),
    ("mmimpute.store", "mmimpute.console"),
    ("mmimpute.spec",),
    ("mmimpute.errors",),
]
MODULES = sorted([*(ROOT / "mmimpute").rglob("*.py"), *(ROOT / "flows").rglob("*.py")])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int | None:
    for depth, prefixes in enumerate(LAYERS):
        if any(module == p or module.startswith(p + ".") for p in prefixes):
            return depth
    return None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path):
    own = layer_of(name_of(path))
    if name_of(path) == "mmimpute":
        return
    assert own is not None, f"{name_of(path)} belongs to no layer: add it to LAYERS"
    up = [i for i in imports_of(path) if (depth := layer_of(i)) is not None and depth < own]
    assert not up, f"{name_of(path)} imports from a layer above it: {up}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_engines_stay_in_their_packages(path):
    roots = {i.split(".")[0] for i in imports_of(path)}
    name = name_of(path)
    assert "ray" not in roots or name.startswith("mmimpute.cluster")
    assert "prefect" not in roots or name.startswith("flows")
    if name.startswith("mmimpute.model"):
        assert not roots & {"pyarrow", "obstore", "deltalake", "mmimpute.data", "pathlib", "os"}
    if name.startswith("mmimpute.data") and name != "mmimpute.data.tensors":
        assert "torch" not in roots
