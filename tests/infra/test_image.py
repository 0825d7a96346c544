"""The Dockerfile, and what it installs."""

import re
import subprocess
import tomllib
from importlib.metadata import distributions

from packaging.specifiers import SpecifierSet

from tests.infra.files import INFRA, answer, program

LOCKS = {name: (INFRA / f"requirements{name}.lock").read_text() for name in ("", "-cpu", "-cuda")}
LINE = re.compile(r"(?P<name>[a-z0-9][a-z0-9.-]*)==(?P<version>[^ ]+) --hash=sha256:[0-9a-f]{64}")


def pinned(text: str) -> dict[str, str]:
    """Versions by name, as names are compared."""
    lines = [line.split(" ")[0].split("==") for line in text.splitlines() if "==" in line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in lines}


def test_hadolint():
    answer(program("hadolint"), "--failure-threshold", "info", INFRA / "Dockerfile")


def test_policy():
    text = (INFRA / "Dockerfile").read_text()
    steps = re.findall(r"^(\w+) (.*)", text.replace("\\\n", ""), re.M)
    stages = [line for word, line in steps if word == "FROM"]
    bases = {line.split()[0] for line in stages if ":" in line.split()[0]}
    assert bases == {"python:3.11.14-slim-bookworm${BASE_DIGEST}"}  # one base, by tag and digest
    assert [line for word, line in steps if word == "USER"] == ["10001:10001"]
    last = text[text.rindex("\nFROM") :]
    assert "pip" not in last and "apt-get" not in text and "curl" not in text
    installs = [line for word, line in steps if word == "RUN" and "pip install" in line]
    assert all("--require-hashes" in line or "--no-deps --no-build-isolation /build" in line for line in installs) and len(installs) == 4
    given = " ".join(line for word, line in steps if word in ("ARG", "ENV"))
    assert not re.search("SECRET|TOKEN|PASSWORD|KEY", given)


def test_only_what_is_needed_goes_to_the_builder():
    lines = (INFRA / "Dockerfile.dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.M)
    sources = {source for line in copied if "--from" not in line for source in line.split()}
    assert lines[0] == "*" and {line[1:].rstrip("/") for line in lines if line.startswith("!")} == {
        re.sub(r"requirements.*\.lock", "*.lock", source) for source in sources
    }


def test_the_locks_hold_every_archive_by_its_hash_and_the_tested_versions():
    for text in LOCKS.values():
        assert all(LINE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    locked = pinned(LOCKS[""] + LOCKS["-cuda"])
    tested = pinned((INFRA.parent / "constraints.txt").read_text())
    assert {name: (locked[name], version) for name, version in tested.items() if name in locked and locked[name] != version} == {}
    assert pinned(LOCKS["-cpu"]) == {"torch": locked["torch"] + "+cpu"}
    project = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["cluster"] + extras["downstream"] + extras["retrieval"]
    assert {re.match("[A-Za-z0-9-]+", line)[0].lower() for line in wanted} <= locked.keys()


def test_what_is_pinned_installs_on_the_oldest_python_that_is_promised():
    """pip here has accepted it for the Python at hand; Debian 12 has 3.11.2."""
    promised = tomllib.loads((INFRA.parent / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = re.match(r">=([\d.]+)", promised)[1]
    asked = {d.name: d.metadata.get("Requires-Python", "") for d in distributions()}
    assert {name: python for name, python in asked.items() if oldest not in SpecifierSet(python)} == {}


def test_the_entrypoint_makes_variables_of_secrets(tmp_path):
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("a b'c\"$d")
    (tmp_path / "identities.json").write_text("{}")
    told = answer("env", f"SECRETS={tmp_path}", INFRA / "entrypoint.sh", "sh", "-c", 'printf %s "$AWS_SECRET_ACCESS_KEY"')
    assert told == "a b'c\"$d"
    assert answer("env", f"SECRETS={tmp_path}/none", INFRA / "entrypoint.sh", "echo", "there are none") == "there are none\n"


def test_secrets_are_made_once_and_closed(tmp_path):
    folder = tmp_path / "secrets"
    answer("sh", INFRA / "make-secrets.sh", folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    kept = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(kept) == 6 and all(len(text) >= 20 for text in kept.values()) and len(set(kept.values())) == 6
    assert subprocess.run(["sh", INFRA / "make-secrets.sh", folder], capture_output=True, check=False).returncode
