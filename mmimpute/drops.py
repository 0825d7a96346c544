"""New data drops: which shards the table was not made from yet, and whether a drop is whole.

A drop is settled when nothing that belongs to it was written in the last `quiet` minutes, by the store's clock. Objects appear whole
(S3 shows no half-written one), so what can be half-uploaded is the set of them; whoever uploads slower than one object in `quiet`
minutes needs a longer one.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from mmimpute.data import storage, table
from mmimpute.data.shards import Shard
from mmimpute.errors import UserError


class Drop(NamedTuple):
    """Shards that the table does not hold in this version. name: a digest of their keys and ETags."""

    name: str
    shards: list[Shard]
    settled: bool

    @property
    def told(self) -> dict[str, Any]:
        """What may be said of it anywhere: shard names can hold anything, so their number."""
        return {"drop": self.name, "shards": len(self.shards), "bytes": sum(s.size for s in self.shards)}


def pending(shards: Iterable[Shard], output: str) -> list[Shard]:
    """Those whose version is in the table's newest one under none of the models and settings that it was made with."""
    held = table.table_state(output).keys
    made_with = {(c["lineage"]["model_digest"], c["lineage"]["settings_digest"]) for c in table.history(output)}
    return [s for s in shards if not any(table.output_key(s, *digests) in held for digests in made_with)]


def look(shards: str, output: str, quiet: timedelta) -> Drop | None:
    """The drop that lies there now; None where the table is made from all that is listed. Raises UserError as `storage.objects`."""
    # The old ones first: what is written between the two listings is in the second alone, so the drop is not settled.
    old = set(storage.objects(shards, ".parquet", before=datetime.now(UTC) - quiet))
    new = pending((Shard(*o) for o in storage.list_objects(shards, ".parquet")), output)
    if not new:
        return None
    return Drop(table.digest(*(f"{s.key} {s.etag}" for s in new)), new, all(storage.StoredObject(*s) in old for s in new))


def announced(output: str, drop: Drop) -> bool:
    """Whether all of it was in the last drop that was announced. What is left of that one, a shard set aside say, is no news."""
    if not storage.exists(*_note(output)):
        return False
    return set(_versions(drop)) <= set(json.loads(storage.read(*_note(output))))


def note_announced(output: str, drop: Drop) -> None:
    """One event per drop: the next look finds this note. A drop that grows is another one.

    The last one's note is enough: whatever of an earlier one is still to be taken in is a part of every later one.
    """
    storage.write(*_note(output), json.dumps(_versions(drop)).encode())


def _note(output: str) -> tuple[str, str]:
    return storage.join(output, "_runs"), "announced.json"


def _versions(drop: Drop) -> list[str]:
    return [table.digest(s.key, s.etag) for s in drop.shards]


def notified(message: dict[str, Any]) -> list[str]:
    """URLs of the objects that an S3 event notification tells of.

    Takes what S3 sends to SQS, SNS, Lambda and webhooks (`Records`, event structure 2.x; also inside the `Message` or `body` of SNS and
    SQS) and what EventBridge makes of it (`detail`). Keys are URL-encoded in the former, plain in the latter.
    Raises UserError for anything else; S3's own test event tells of nothing.
    """
    try:
        if message.get("Event") == "s3:TestEvent":
            return []
        for envelope in ("Message", "body"):
            if isinstance(message.get(envelope), str):
                return notified(json.loads(message[envelope]))
        if "detail" in message:
            return [f"s3://{message['detail']['bucket']['name']}/{message['detail']['object']['key']}"]
        if "Records" in message and any("body" in r or "Sns" in r for r in message["Records"]):
            return [url for r in message["Records"] for url in notified(r.get("Sns") or r)]
        return [f"s3://{r['s3']['bucket']['name']}/{unquote_plus(r['s3']['object']['key'])}" for r in message["Records"]]
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError("not an S3 event notification: expected Records[].s3 (S3, SQS, SNS) or detail (EventBridge)") from None


def concerns(urls: Iterable[str], shards: str) -> bool:
    """Whether one of these objects is a shard of the cohort."""
    prefix = storage.normalise(shards).rstrip("/") + "/"
    return any(url.startswith(prefix) and url.endswith(".parquet") for url in urls)
