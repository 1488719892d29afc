"""Answers as server-sent events. A reply is streamed once it is complete, so that errors are HTTP errors."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from starlette.responses import StreamingResponse


def event_stream(events: Iterable[Mapping[str, Any] | str], named: bool = False) -> StreamingResponse:
    """Return a response that sends ``events``.

    Args:
        named: events have names, which are their ``type``.
    """

    async def lines() -> AsyncIterator[str]:
        for event in events:
            name = f"event: {event['type']}\n" if named and isinstance(event, Mapping) else ""
            yield f"{name}data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
