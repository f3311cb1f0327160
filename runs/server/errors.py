"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error", 500: "server_error"}
"""By status; others are `invalid_request_error`."""


class ApiError(Exception):
    """Answers a request with an error.

    Args:
        status: HTTP's.
        message: what is wrong, and what helps.
        param: which of the body's parameters it is about.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content, self.status, headers=self.headers)


def about(param: str, message: str) -> PydanticCustomError:
    """What a validator of a whole body raises about one of its parameters."""
    return PydanticCustomError("parameter", "{message}", {"param": param, "message": message})


def of_exception(error: Exception) -> ApiError:
    """The answer when this was raised: by us, by the framework (unknown paths, methods), or by mistake."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server made a mistake; its log says which")


def of_validation(error: ValidationError) -> ApiError:
    """What is wrong with a body, by its first mistake; where several types were tried, by the one that fits best."""
    errors = error.errors(include_url=False, include_input=False)
    first = max(errors, key=lambda entry: len(entry["loc"]))
    if first["type"] == "parameter":
        return ApiError(400, str(first["msg"]), first["ctx"]["param"], "invalid_value")
    # Behind the names of parameters stand those of the types that were tried.
    path = [str(part) for part in first["loc"] if part not in ("str", "int") and "[" not in str(part)]
    message = str(first["msg"]).removeprefix("Value error, ")
    param = path[0] if path else None
    return ApiError(400, f"{'.'.join(path)}: {message}" if path else message, param, "invalid_value")
