"""What goes wrong, in the shape in which OpenAI's clients expect it."""

from __future__ import annotations

import math
from typing import Any

from splitnet.errors import (
    BadInput,
    Cancelled,
    DeadlineExceeded,
    InsufficientMemory,
    NodeUnavailable,
    NotFound,
    NotPermitted,
    Overloaded,
    SplitnetError,
    UserError,
)  # fmt: skip

__all__ = ["ApiError", "busy", "from_splitnet", "invalid"]

_REQUEST, _SERVER, _BUSY = "invalid_request_error", "server_error", "rate_limit_error"


class ApiError(Exception):
    """`param` is the field that is wrong, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that cannot be."""
    return ApiError(400, message, param=param, code=code)


def busy(message: str, retry_after_s: float) -> ApiError:
    """429, with when to come back: whole seconds for everybody, milliseconds for clients that know the header."""
    wait_s = retry_after_s if retry_after_s > 0 else 1.0
    headers = (("retry-after", str(max(1, math.ceil(wait_s)))), ("retry-after-ms", str(math.ceil(wait_s * 1000))))
    return ApiError(429, message, kind=_BUSY, code="rate_limit_exceeded", headers=headers)


def from_splitnet(error: SplitnetError) -> ApiError:
    """The nodes' errors. What the caller did wrong is told in full; of the rest, what he can do about it."""
    if isinstance(error, Overloaded):
        return busy(f"the deployment has no room for another session now: {error.message}", error.retry_after_s)
    if isinstance(error, BadInput):
        return ApiError(400, error.message + (f" ({error.remedy})" if error.remedy else ""), code="invalid_value")
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, f"the model did not answer in time: {error.message}", kind=_SERVER, code="timeout")
    if isinstance(error, NodeUnavailable | NotFound | InsufficientMemory | NotPermitted | Cancelled):
        return ApiError(
            503, f"the model is not available now: {error.message}", kind=_SERVER, code="model_unavailable", headers=(("retry-after", "1"),)
        )
    if isinstance(error, UserError):
        return ApiError(503, f"the model is not served as the gateway expects: {error.message}", kind=_SERVER, code="model_unavailable")
    return ApiError(500, f"the model failed: {error.message}", kind=_SERVER, code="internal_error")
