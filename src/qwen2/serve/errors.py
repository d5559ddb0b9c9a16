"""Errors in the words of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response


class ApiError(HTTPException):
    """A request that can't be served: what is said of it, and as what.

    Args:
        status: HTTP status.
        message: one line for the person who wrote the request.
        param: the field that it is about.
        code: a word that programs can tell it by, such as `context_length_exceeded`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status_code)
                or ("server_error" if self.status_code >= 500 else "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Json:
        """The error as an HTTP response."""
        return Json(self.body, self.status_code, self.headers)


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


class Json(Response):
    """JSON in UTF-8, whatever its strings hold: a lone surrogate becomes "?"."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of `content`."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """`content` in UTF-8, on one line."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="replace")


def of_validation(errors: Sequence[Any], known: Sequence[str] = ()) -> ApiError:
    """The first of pydantic's errors, as one line that names the field.

    Args:
        errors: as pydantic gives them, each beginning its place with "body" or "path".
        known: names of fields there are, to propose the nearest of.
    """
    first = errors[0]
    place = [part for part in first["loc"][1:] if part != "function-after"]
    param = ".".join(str(part) for part in place) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error')}")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"unknown field {param!r}{hint}", param=param, code="unknown_field")
    if first["type"] == "missing" and not place:
        return ApiError(400, "the request has no body; it is to be a JSON object")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)
