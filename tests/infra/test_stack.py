"""The commands, variables, secrets and health checks of infra/compose.yaml, run on this host: one flow through all of its parts.

Changed are only names (127.0.0.1 for each part), ports (free ones) and folders. PostgreSQL is Debian's where that is installed, else
Prefect keeps its SQLite. Ray's nodes listen on this host's own address, as they always do, and want the token.
"""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from mmimpute import registry, store
from mmimpute.data.shards import list_shards
from mmimpute.data.table import expected, table_state
from mmimpute.imputing import settings_digest
from mmimpute.spec import ImputeSettings
from tests.conftest import SPEC, free_port, write_cohort
from tests.infra.files import INFRA, PLACES, answer, program

pytestmark = [pytest.mark.services, pytest.mark.slow]
PORTS = re.compile(r"\b(8333|18333|9333|19333|8080|18080|8888|18888|5432|4200|6379|8081)\b")
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
LOOPBACK = "127.0.0.1"


class Stack:
    """The parts of the compose file as processes of this host."""

    def __init__(self, folder: Path):
        self.folder = folder
        whole = json.loads(answer(program("docker-compose"), "-f", INFRA / "compose.yaml", "config", "--format", "json"))
        self.parts, self.files = whole["services"], {name: Path(secret["file"]).name for name, secret in whole["secrets"].items()}
        answer("sh", INFRA / "make-secrets.sh", folder / "secrets")
        self.ports = {}
        self.running = []
        (folder / "data").mkdir()

    def local(self, text: str, part: str) -> str:
        """What a part is told, with this host's names, ports and folders."""
        text = re.sub(rf"\b({'|'.join(self.parts)})(?=:\d)|0\.0\.0\.0|(?<=listen_addresses=)\*", LOOPBACK, text)
        text = PORTS.sub(lambda found: self.ports.setdefault(found[0], str(free_port())), text)
        return text.replace("/run/secrets", str(self.folder / part)).replace("-dir=/data", f"-dir={self.folder}/data")

    def environment(self, part: str) -> dict[str, str]:
        """What the image and the compose file give to a part, and nothing of this process."""
        secrets = self.folder / part
        if not secrets.exists():
            secrets.mkdir()
            for secret in self.parts[part].get("secrets", []):
                shutil.copy(self.folder / "secrets" / self.files[secret["source"]], secrets / secret["source"])
        image = dict(re.findall(r"\b([A-Z_]+)=(\S+)", (INFRA / "Dockerfile").read_text().split("\nENV ")[-1].split("\nUSER")[0]))
        image |= {"HOME": str(self.folder), "PREFECT_HOME": str(self.folder / "prefect"), "RAY_TMPDIR": str(self.folder)}
        image |= {"PATH": f"{PLACES}:{POSTGRES}", "SECRETS": str(secrets)} | {n: os.environ[n] for n in ("PYTHONPATH",) if n in os.environ}
        told = self.parts[part].get("environment", {})
        given = {name: LOOPBACK if value in self.parts else self.local(value, part) for name, value in told.items()}
        return image | {n: v for n, v in given.items() if POSTGRES or "DATABASE" not in n}

    def command(self, part: str, words: list[str]) -> list[str]:
        return [str(INFRA / "entrypoint.sh"), *(self.local(word, part) for word in words)]

    def start(self, part: str, *more: str, **options) -> None:
        command = [*self.command(part, self.parts[part]["command"]), *more]
        with open(self.folder / f"{part}.log", "wb") as log:
            given = {"env": self.environment(part), "stdout": log, "stderr": log, "cwd": self.folder, "start_new_session": True}
            self.running.append(subprocess.Popen(command, **given | options))

    def wait(self, part: str) -> None:
        """Until the part's own health check passes."""
        command, began = self.command(part, self.parts[part]["healthcheck"]["test"][1:]), time.monotonic()
        if command[1] == "entrypoint":
            del command[1]
        while subprocess.run(command, env=self.environment(part), capture_output=True, check=False).returncode:
            died = any(found.poll() for found in self.running)
            assert not died and time.monotonic() - began < 120, (self.folder / f"{part}.log").read_text()[-2000:]
            time.sleep(0.2)

    def run(self, *words: str) -> str:
        """A command in the worker's container."""
        done = subprocess.run(
            [INFRA / "entrypoint.sh", *words],
            env=self.environment("prefect-worker"),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text()

    def mine(self) -> list[psutil.Process]:
        """Every process of the stack, those that left their parents too: they know its folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.folder) in process.environ().get("RAY_TMPDIR", "") or str(self.folder) in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stop(self) -> None:
        for process in reversed(self.running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for process in self.mine():
            with suppress(psutil.Error):
                process.kill()


def start_postgres(stack: Stack) -> None:
    """What the image of PostgreSQL does before the command: a cluster with the user, the password and the database of its variables."""
    given = stack.parts["postgres"]["environment"]
    folder = Path(tempfile.mkdtemp(prefix="postgres", dir=stack.folder))
    (folder / "password").write_text(stack.secret(Path(given["POSTGRES_PASSWORD_FILE"]).name))
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        shutil.chown(folder, "postgres")
    quiet = {"check": True, "capture_output": True, "cwd": folder, **user}
    how = ("--no-sync", "-A", "scram-sha-256", "--pwfile", folder / "password")
    subprocess.run([POSTGRES / "initdb", "-D", folder / "data", "-U", given["POSTGRES_USER"], *how], **quiet)
    stack.start("postgres", "-D", str(folder / "data"), "-c", f"unix_socket_directories={folder}", **user)
    stack.wait("postgres")
    make = [POSTGRES / "createdb", "-h", LOOPBACK, "-p", stack.ports["5432"], "-U", given["POSTGRES_USER"], given["POSTGRES_DB"]]
    subprocess.run(make, env={"PGPASSWORD": stack.secret("PREFECT_SERVER_DATABASE_PASSWORD")}, check=True, capture_output=True)


@pytest.fixture(scope="module")
def stack():
    folder = Path(tempfile.mkdtemp(prefix="mm"))  # not pytest's: Ray's sockets want a short path
    folder.chmod(0o711)  # PostgreSQL's user passes through
    found = Stack(folder)
    try:
        for part in ("store", "ray-head"):
            found.start(part)
        if POSTGRES:
            start_postgres(found)
        found.start("prefect-server")
        for part in ("store", "ray-head"):
            found.wait(part)
        found.start("ray-worker")
        found.wait("prefect-server")
        found.start("prefect-worker")
        for part in ("ray-worker", "prefect-worker"):
            found.wait(part)
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cohort(stack):
    """The URL of 120 records in the stack's object store."""
    endpoint = store.Endpoint(
        f"http://{LOOPBACK}:{stack.ports['8333']}", stack.secret("AWS_ACCESS_KEY_ID"), stack.secret("AWS_SECRET_ACCESS_KEY")
    )
    store.create_bucket(endpoint, "ward")
    (stack.folder / "cohort.toml").write_text(SPEC)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in endpoint.environment().items():
            patch.setenv(name, value)
        write_cohort("s3://ward/shards", rows=120, shards=3)
        yield "s3://ward"


def ask(stack: Stack, path: str, body: dict | None = None, who: str | None = None) -> dict:
    """Prefect's API, asked as `who`, by default as one that knows the secret."""
    sign = base64.b64encode((who or stack.secret("PREFECT_SERVER_API_AUTH_STRING")).encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {sign}"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://{LOOPBACK}:{stack.ports['4200']}/api/{path}", data, headers)
    with urllib.request.urlopen(request, timeout=20) as told:
        return json.load(told)


def test_a_run_goes_through_all_parts(stack, cohort):
    places = "".join(f'{name} = "{cohort}/{name}"\n' for name in ("shards", "model", "output"))
    address = stack.local("ray-head:6379", "prefect-worker")
    text = f'title = "Ward"\nspec = "cohort.toml"\n{places}[fit]\nepochs = 1\n[cluster]\naddress = "{address}"\n'
    (stack.folder / "run.toml").write_text(text)
    stack.run("mmimpute", "deploy", str(stack.folder / "run.toml"))
    deployed = ask(stack, "deployments/name/population-run/ward")
    run = ask(stack, f"deployments/{deployed['id']}/create_flow_run", {})["id"]
    began = time.monotonic()
    while (found := ask(stack, f"flow_runs/{run}"))["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
        assert time.monotonic() - began < 400, found["state"]
        time.sleep(0.5)
    assert found["state_type"] == "COMPLETED", found["state"]["message"] + (stack.folder / "prefect-worker.log").read_text()[-3000:]
    wanted = expected(list_shards(f"{cohort}/shards"), registry.champion(f"{cohort}/model"), settings_digest(ImputeSettings()))
    assert len(wanted) == 3 and table_state(f"{cohort}/output").keys == wanted.keys()


def test_who_does_not_know_the_secrets_gets_nowhere(stack):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(stack, "admin/version", who="mmimpute:guess")
    ray = [program("ray"), "health-check", f"--address={stack.local('ray-head:6379', 'ray-head')}"]
    known = stack.environment("ray-head") | {"RAY_AUTH_TOKEN": stack.secret("RAY_AUTH_TOKEN")}
    assert subprocess.run(ray, env=known, capture_output=True, check=False).returncode == 0
    done = subprocess.run(ray, env=known | {"RAY_AUTH_TOKEN": "guess"}, capture_output=True, check=False)
    assert done.returncode != 0


def test_no_secret_stands_in_a_command_or_a_log(stack):
    secrets = {
        path.read_text() for path in (stack.folder / "secrets").iterdir() if path.name not in ("AWS_ACCESS_KEY_ID", "identities.json")
    }
    commands = [" ".join(process.cmdline()) for process in stack.mine()]
    logs = [
        path.read_text(errors="replace") for path in stack.folder.rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err")
    ]
    assert len(commands) > 10 and len(logs) > 10
    assert not [secret for secret in secrets if any(secret in text for text in commands + logs)]
