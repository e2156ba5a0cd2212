"""Errors of requests, in the shapes of OpenAI and of Anthropic."""

from collections.abc import Iterable, Mapping

from starlette.responses import JSONResponse

from qlora_jax.untrusted_json import MAX_LINES

# Status -> type of the error, by Anthropic's names; OpenAI's clients go by the status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: the HTTP status.
      param: the field that is wrong, if it is one.
      code: OpenAI's word for some errors, on which clients act.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def bad_request(problems: Iterable[str]) -> ApiError:
    """Returns the error for a request with problems, each of which begins with the field's name."""
    lines = [*problems]
    lines = [*lines[:MAX_LINES], *([f"and {len(lines) - MAX_LINES} more problems"] if len(lines) > MAX_LINES else [])]
    param, colon, _ = lines[0].partition(": ")
    return ApiError(400, "\n".join(lines), param=param if colon and " " not in param else None)


def too_long(prompt: int, positions: int, param: str = "messages") -> ApiError:
    """Returns the error for a prompt that leaves no position for a reply."""
    message = f"the prompt has {prompt} tokens; prompt and reply have room for {positions} together. Shorten it"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def openai_error(error: ApiError) -> dict[str, object]:
    """Returns the error in OpenAI's shape."""
    kind = TYPES[error.status]
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def anthropic_error(error: ApiError) -> dict[str, object]:
    """Returns the error in Anthropic's shape."""
    return {"type": "error", "error": {"type": TYPES[error.status], "message": str(error)}}


def error_response(error: ApiError, path: str) -> JSONResponse:
    """Returns the response for an error of a request to `path`."""
    shape = anthropic_error if path.startswith("/v1/messages") else openai_error
    return JSONResponse(shape(error), error.status, headers=error.headers)
