"""infra/compose.yaml, as Docker's own program reads it, and what it may not say."""

import json

import pytest

from tests.infra.files import INFRA, answer, program


@pytest.fixture(scope="module")
def stack() -> dict:
    """What `docker compose config` makes of the file: it refuses what is not of its schema."""
    return json.loads(answer(program("docker-compose"), "-f", INFRA / "compose.yaml", "config", "--format", "json"))


def test_parts(stack):
    assert set(stack["services"]) == {"store", "postgres", "prefect-server", "prefect-worker", "ray-head", "ray-worker"}


def test_an_unknown_key_is_refused(tmp_path):
    broken = (INFRA / "compose.yaml").read_text().replace("shm_size", "shm_sise")
    (tmp_path / "compose.yaml").write_text(broken)
    with pytest.raises(AssertionError, match="shm_sise"):
        answer(program("docker-compose"), "-f", tmp_path / "compose.yaml", "config")


def test_nothing_listens_beyond_this_machine(stack):
    ports = [port for service in stack["services"].values() for port in service.get("ports", [])]
    assert ports and {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert not any(service.get("network_mode") == "host" or service.get("privileged") for service in stack["services"].values())
    assert {str(port["published"]) for port in ports} == {"8333", "4200"}  # objects and Prefect: no dashboard of Ray's


def test_every_part_is_locked_down_and_watched(stack):
    for name, service in stack["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["healthcheck"]["test"], name


def test_secrets_are_files(stack):
    """A secret's name stands in the file, its value nowhere: no variable of a part is named like one."""
    secret = set(stack["secrets"])
    used = {entry["source"] for service in stack["services"].values() for entry in service["secrets"]}
    assert used == secret and all(entry["file"].endswith((name, "AUTH_STRING")) for name, entry in stack["secrets"].items())
    for service in stack["services"].values():
        named = set(service.get("environment", {}))
        assert not named & secret
        assert not [
            n for n in named if any(part in n for part in ("PASSWORD", "SECRET", "TOKEN", "AUTH_STRING")) and not n.endswith("_FILE")
        ]


def test_ray_asks_for_its_token(stack):
    for name in ("ray-head", "ray-worker", "prefect-worker"):
        service = stack["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" in {entry["source"] for entry in service["secrets"]}
