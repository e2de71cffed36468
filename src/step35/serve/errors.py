"""What a client is told when a request fails: OpenAI's error shape, or Anthropic's under /v1/messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from step35.errors import Step35Error

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
INTERNAL = "internal_error"
"""Code of failures that are bugs: the log has the traceback, the client does not."""
ANTHROPIC_PATH = "/v1/messages"


class ApiError(Exception):
    """A failure with the status and the fields that the client sees."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    def body(self, path: str = "") -> dict[str, Any]:
        """Return the JSON body in the dialect of `path`."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        if path.startswith(ANTHROPIC_PATH):
            kind = "api_error" if kind == "server_error" else kind
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(path), status_code=self.status, headers=self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what the client may see of any exception: a user's mistakes in full, bugs as a bare 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Step35Error):
        return ApiError(str(error))
    if isinstance(error, RequestValidationError):
        return _validation(error)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), status=error.status_code, headers=error.headers)
    return ApiError("the server failed on this request; its log says why.", status=500, code=INTERNAL)


def install(app: FastAPI) -> None:
    """Answer every exception of `app` in the shape that the path's clients read."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    for kind in (ApiError, Step35Error, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _validation(error: RequestValidationError) -> ApiError:
    """Name the first field that does not fit, its value and what is allowed."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    message = problem["msg"].removeprefix("Value error, ").removesuffix(".")
    if problem["type"] == "json_invalid":
        return ApiError(f"the body is not JSON: {message}.", code="invalid_json")
    value = "" if problem["type"] == "missing" or not place else f"={problem.get('input')!r:.200}"
    return ApiError(f"{place}{value}: {message}." if place else f"{message}.", param=place or None)
