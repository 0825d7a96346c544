"""The types of the public surface, as mypy's strict mode sees them."""

from pathlib import Path

from mypy import api


def test_the_public_surface_is_typed(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    told, failed, status = api.run([])
    assert status == 0, told + failed
