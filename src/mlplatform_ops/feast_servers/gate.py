"""The gate in front of Feast's servers: a list says what is open, and everything else is refused.

Feast opens endpoints that write (`/push`, `/materialize`, ...) to anyone who reaches the port. A list of what is open
stays right when a later release of Feast adds an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import Message, Receive


class AllowList(Starlette):
    """An application that answers its routes and refuses everything else with 403.

    A refusal, and any `HTTPException` that a route raises, is a small JSON document: `{"detail": "..."}`.

    Args:
        routes: What is open: paths, methods, and what answers them.
        refusal: What a refused request is told.
        hosts: Names by which the server may be called; any by default.
    """

    def __init__(self, routes: Sequence[BaseRoute], *, refusal: str, hosts: Sequence[str] = ()) -> None:
        def refuse(_: Request, __: Exception) -> JSONResponse:
            return JSONResponse({"detail": refusal}, 403)

        middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else []
        # Starlette answers 404 for another path and 405 for another method.
        handlers = {404: refuse, 405: refuse, HTTPException: explain}
        super().__init__(routes=list(routes), middleware=middleware, exception_handlers=handlers)
        self.router.redirect_slashes = False


def explain(_: Request, error: Exception) -> JSONResponse:
    """Answer with an HTTP error's status and reason."""
    assert isinstance(error, HTTPException)  # noqa: S101 - Starlette calls it for these alone
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def read_body(request: Request, *, limit_bytes: int) -> bytes:
    """Read a request's body, and stop at a limit.

    Raises:
        HTTPException: The body is larger than the limit (status 413). Of a body that says its size nothing is read.
    """
    too_large = HTTPException(413, f"the body is larger than {limit_bytes} bytes; ask in several requests")
    size = request.headers.get("content-length", "0")
    if not size.isdigit() or int(size) > limit_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit_bytes:
            raise too_large
    return bytes(body)


def replay(body: bytes, receive: Receive) -> Receive:
    """Give the next application a body that was read already.

    Args:
        body: The body.
        receive: What comes after it, which is the end of the connection.
    """
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again
