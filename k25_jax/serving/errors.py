"""Errors as OpenAI's API gives them: {"error": {"message", "type", "param", "code"}} with a status."""

import re

LONGEST = 2000  # characters of a message
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error: `param` names the field of the body, `retry_after` are seconds."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.param, self.code, self.status, self.retry_after = param, code, status, retry_after

    def body(self) -> dict:
        """What goes over the wire."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self)[:LONGEST], "type": kind, "param": self.param, "code": self.code}}


def from_text(error: Exception, default: str) -> ApiError:
    """The error of a part of ours whose text begins with the place in the body, or else concerns `default`."""
    place = re.match(r"(?:messages|tools)\b[\w.$\[\]]*", str(error))
    return ApiError(str(error), place[0].rstrip(".") if place else default)


def show(value) -> str:
    """A value of a body, for a message: short, and of what is large only its kind."""
    kinds = {list: "a list", dict: "an object"}
    text = kinds.get(type(value)) or repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def starting(what: str) -> ApiError:
    """The server has no model yet."""
    return ApiError(f"the server is starting ({what}); try again", code="starting", status=503, retry_after=5)


def stopped() -> ApiError:
    """The server takes no more requests."""
    return ApiError("the server is shutting down", code="shutting_down", status=503, retry_after=10)


def unavailable(problem: Exception) -> ApiError:
    """The engine does not answer any more."""
    return ApiError(str(problem), code="engine_unavailable", status=503, retry_after=10)


def overloaded(problem: str) -> ApiError:
    """There is no room for a request now."""
    return ApiError(problem, code="overloaded", status=429, retry_after=1)


def too_large(limit: int) -> ApiError:
    """A body of too many bytes."""
    return ApiError(f"the body is larger than the {limit} bytes that are taken", code="body_too_large", status=413)
