"""An HTTP proxy in front of the object store that injects faults, seeded and counted.

The Host header goes through unchanged: the store checks the signature against the one that the client signed.
"""

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

FAULTS = ("500", "503", "SlowDown", "reset", "reset after")
CODES = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Service Unavailable", "ServiceUnavailable")}
CODES["SlowDown"] = ("503 Slow Down", "SlowDown")


class Proxy:
    """`injected` counts what clients were given; `reset after`: the store did what it was asked, and nobody heard of it."""

    def __init__(self, store_url: str, share: float, seed: int, on: tuple[bytes, str] | None):
        self.store, self.share, self.rng, self.on = urlsplit(store_url), share, random.Random(seed), on
        self.requests, self.injected = 0, Counter()

    async def serve(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        """One connection of a client, request after request."""
        server, store = await asyncio.open_connection(self.store.hostname, self.store.port)
        try:
            while request := await _message(client):
                self.requests += 1
                fault = self._draw(request)
                if not await self._answer(request, fault, answer, server, store):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the other side went away
        except asyncio.CancelledError:
            pass  # the proxy ends, a client's idle connection with it
        finally:
            answer.close()
            store.close()

    def _draw(self, request: bytes) -> str | None:
        if self.on and re.match(self.on[0], request):
            fault, self.on = self.on[1], None
            return fault
        return self.rng.choice(FAULTS) if self.rng.random() < self.share else None

    async def _answer(self, request: bytes, fault: str | None, answer, server, store) -> bool:
        """Answers one request; says whether the connection goes on."""
        if fault:
            self.injected[fault] += 1
        if fault in CODES:
            answer.write(_refusal(*CODES[fault], request))
            await answer.drain()
            return True
        if fault != "reset":
            store.write(request)
            response = await _message(server, request.startswith(b"HEAD"))
        if fault:
            answer.transport.abort()
            return False
        answer.write(response)
        await answer.drain()
        return bool(response)


async def _message(stream: asyncio.StreamReader, no_body: bool = False) -> bytes:
    """One whole request or response; nothing where the other side has closed."""
    try:
        head = await stream.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
    if no_body or head.startswith((b"HTTP/1.1 204", b"HTTP/1.1 304")):
        return head
    if headers.get(b"transfer-encoding") == b"chunked":
        return head + await _chunks(stream)
    return head + await stream.readexactly(int(headers.get(b"content-length", 0)))


async def _chunks(stream: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = await stream.readuntil(b"\r\n")
        chunk = await stream.readexactly(int(size, 16) + 2)
        body += size + chunk
        if int(size, 16) == 0:
            return body


def _refusal(status: str, code: str, request: bytes) -> bytes:
    body = b"" if request.startswith(b"HEAD") else f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def proxy(store_url: str, share: float = 0.0, seed: int = 0, on: tuple[bytes, str] | None = None) -> Iterator[Proxy]:
    """A proxy in a thread, on a port of its own. on: a pattern, and the fault for the first request that it matches."""
    found, up = Proxy(store_url, share, seed, on), threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(found.serve, "127.0.0.1", 0, limit=1 << 20)
        found.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        found.loop, found.stopped = asyncio.get_running_loop(), asyncio.Event()
        up.set()
        async with server:
            await found.stopped.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    up.wait()
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(found.stopped.set)
        thread.join()
