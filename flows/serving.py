"""A Prefect server and a worker on this machine, for trying deployments out: `python -m flows.serving HOME PORT`."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mmimpute.console import console, report_errors
from mmimpute.errors import UserError

HOST = "127.0.0.1"
UP_SECONDS = 120
DOWN_SECONDS = 30


@contextmanager
def program(log: Path, environment: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen]:
    """A `prefect` command in the background that ends with the context."""
    with open(log, "ab") as sink:
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.Popen(command, env=os.environ | environment, stdout=sink, stderr=sink, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # a worker first ends what it runs
        try:
            process.wait(DOWN_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def served(home: Path, port: int, pool: str) -> Iterator[str]:
    """Server and worker; what they keep stands under `home`. Yields the API's URL.

    The database is SQLite, or that of PREFECT_SERVER_DATABASE_CONNECTION_URL. Raises UserError where the server does not come up.
    """
    home.mkdir(parents=True, exist_ok=True)
    api = f"http://{HOST}:{port}/api"
    environment = {"PREFECT_HOME": str(home.absolute()), "PREFECT_API_URL": api, "PREFECT_LOGGING_LEVEL": "INFO"}
    with ExitStack() as stack:
        stack.enter_context(program(home / "server.log", environment, "server", "start", "--host", HOST, "--port", str(port)))
        _wait_until_up(api, home / "server.log")
        stack.enter_context(program(home / "worker.log", environment, "worker", "start", "--pool", pool, "--type", "process"))
        yield api


def _wait_until_up(api: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < UP_SECONDS:
        try:
            urllib.request.urlopen(f"{api}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"Prefect's server did not start; read {log}, which ends with:\n{log.read_text()[-1000:]}")


def serve(home: Path, port: int, config: Path, cohort: str) -> None:
    """Serves one cohort until it is told to stop (Ctrl-C or SIGTERM)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), served(home / "prefect", port, "mmimpute") as api:
        os.environ["PREFECT_API_URL"] = api
        subprocess.run([sys.executable, "-m", "flows.deploying", str(config), cohort], check=True)
        console.print(f"user interface  {api.removesuffix('/api')}")
        console.print(f"start a run     PREFECT_API_URL={api} prefect deployment run population-run/{cohort}")
        console.print(f"logs            {home / 'prefect'}; Ctrl-C ends it")
        signal.pause()


if __name__ == "__main__":
    with report_errors():
        serve(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
