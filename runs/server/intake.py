"""Bodies of requests to validated models, in little time whatever they hold."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from runs.server.bodies import Body
from runs.server.errors import ApiError, of_validation
from runs.server.pace import Pace

LIGHT_BYTES = 32 * 1024
"""Bodies up to here are read at once; larger ones in turn and with pauses, as nothing else runs meanwhile."""

BYTES_A_VALUE = 8
"""A token id, a comma and a space."""

_VALUES_BESIDE_TOKENS = 4096
_TIMES_THE_CONTEXT = 16

B = TypeVar("B", bound=Body)


class Intake:
    """Reads bodies.

    Args:
        most_tokens: of a request; what a body may hold follows from it.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most_items = max(most_tokens, _VALUES_BESIDE_TOKENS)
        self._most_values = _TIMES_THE_CONTEXT * most_tokens + _VALUES_BESIDE_TOKENS
        self._turn, self._pace = asyncio.Lock(), Pace(0.0)

    async def read(self, request: Request, kind: type[B]) -> B:
        """The request's body. Raises ApiError."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            # Pages in a browser can send anything else to a server on its machine without being asked.
            raise ApiError(415, "send JSON, with the header content-type: application/json", code="invalid_json")
        content = await request.body()
        if len(content) <= LIGHT_BYTES:
            return self._parsed(content, kind)
        await self._turn.acquire()
        begin = time.thread_time()
        try:
            return self._parsed(content, kind)
        finally:
            pause = self._pace.pause(time.thread_time() - begin)
            asyncio.get_running_loop().call_later(pause, self._turn.release)

    def _parsed(self, content: bytes, kind: type[B]) -> B:
        if _num_values(content, self._most_values) > self._most_values:
            raise ApiError(
                400,
                f"the body holds more than {self._most_values} values, which no request to this model needs; a prompt "
                "is shorter as a text",
                code="invalid_value",
            )
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:
            # Numbers of too many digits are ValueErrors too.
            said = "its brackets are nested too deep" if isinstance(error, RecursionError) else error
            raise ApiError(400, f"the body is no JSON: {said}", code="invalid_json") from None
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, list) and len(value) > self._most_items:
                message = f"{name[:100]}: {len(value)} entries; at most {self._most_items} are read"
                raise ApiError(400, message, name[:100], "invalid_value")
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise of_validation(error) from None


def _num_values(content: bytes, enough: int) -> int:
    """About how many values a JSON text has; 0 where a glance shows that they are not more than `enough`.

    Long numbers count as several.
    """
    separators = b",", b"[", b"{"
    if len(content) <= BYTES_A_VALUE * enough and sum(map(content.count, separators)) <= enough:
        return 0
    # Without the escaped quotes, every second part between quotes is outside of strings.
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (strings := plain.count(b'"') // 2) > enough:
        return strings
    outside = b"".join(plain.split(b'"')[::2])
    return max(sum(map(outside.count, separators)), len(outside) // BYTES_A_VALUE)
