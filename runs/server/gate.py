"""What every HTTP request passes first: the clock is read, the key is checked, the body is bounded."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runs.server.errors import ApiError

DRAINED_BYTES = 64 * 1024**2
"""Of a body that is too large, read and thrown away, so that the client gets to read the answer."""

_ORIGIN = re.compile(r"https?://[^/]*", re.IGNORECASE)


class Gate:
    """ASGI middleware. Notes when a request was there in `scope["state"]["received"]`.

    Args:
        app: what is behind it.
        now: the engine's clock, in s.
        api_key: wanted under `/v1/`; None: none is.
        most_body_bytes: of a body.
        refused: gets the status of what is turned away here.
    """

    def __init__(
        self,
        app: ASGIApp,
        now: Callable[[], float],
        api_key: str | None,
        most_body_bytes: int,
        refused: Callable[[int], None],
    ) -> None:
        self._app, self._now, self._api_key, self._most = app, now, api_key, most_body_bytes
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["received"] = self._now()
        _take_path(scope)
        try:
            self._check_key(scope["path"], dict(scope["headers"]).get(b"authorization", b""))
            body = await self._body(receive)
        except ApiError as error:
            self._refused(error.status)
            await error.response(scope, receive, send)
            return
        if body is None:
            return
        unread = True

        async def again() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, again, send)

    def _check_key(self, path: str, authorization: bytes) -> None:
        if self._api_key is None or not path.startswith("/v1"):
            return
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self._api_key.encode()):
            raise ApiError(
                401, "no or a wrong API key: send the header Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None when the client is gone. Raises ApiError for one that is too large."""
        parts: list[bytes] = []
        read, more = 0, True
        while more and read <= DRAINED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            read += len(part)
            if read <= self._most:
                parts.append(part)
            more = message.get("more_body", False)
        if read > self._most:
            raise ApiError(
                413,
                f"the body has {read} bytes or more; at most {self._most} are read",
                code="body_too_large",
                headers={"connection": "close"},
            )
        return b"".join(parts)


def _take_path(scope: Scope) -> None:
    """Leave only the path of a target in absolute form, `http://host/path`, which servers must accept (RFC 9112)."""
    origin = _ORIGIN.match(scope["path"])
    if origin is not None:
        scope["path"] = scope["path"][origin.end() :] or "/"
        raw = scope.get("raw_path") or b""
        scope["raw_path"] = b"/" + raw.partition(b"://")[2].partition(b"/")[2]
