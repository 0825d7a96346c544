"""Events that deployments wait for. They tell of a cohort and of counts, never of a shard, a subject or a value."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

from prefect.events import Event
from prefect.events.clients import get_events_client

from mmimpute.data.table import digest
from mmimpute.spec import RunConfig


def resource(config: RunConfig) -> str:
    """The cohort's id among Prefect's resources: the same for all who read these shards into this table."""
    return f"mmimpute.cohort.{digest(config.shards, config.output)}"


def emit(name: str, config: RunConfig, payload: dict[str, Any], event_id: UUID | None = None) -> None:
    """Returns when the server has it, where `prefect.events.emit_event` leaves that to a thread; without a server nobody hears it."""
    told = {"prefect.resource.id": resource(config), "prefect.resource.name": config.title}
    event = Event(event=name, resource=told, payload=payload, id=event_id or uuid4())

    async def send() -> None:
        async with get_events_client() as client:
            await client.emit(event)

    asyncio.run(send())
