"""The application: routes, and the one place where errors turn into HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp

from plait import __version__
from plait.errors import PlaitError, nearest
from plait.server import chat, completions, responses, runs, tokens
from plait.server.config import ServeConfig
from plait.server.guard import Guard
from plait.server.metrics import CONTENT_TYPE
from plait.server.refusal import Refusal, body_of, status_of
from plait.server.reply import asked
from plait.server.schemas import ErrorBody, PlaitOptions
from plait.server.service import Asked, Served, Service


def create_app(config: ServeConfig, served: Sequence[Served]) -> tuple[ASGIApp, Service]:
    """The server as an ASGI application, and what is behind it.

    Args:
        config: Limits and keys.
        served: Models; the first is the default.

    Raises:
        RequestError: The keys are not ones, or the address is open to others without any.
    """
    service = Service(config, served)
    keyring = config.keyring()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        async with service.opened():
            yield

    app = FastAPI(title="Plait", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_exception_handler(PlaitError, _plait_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    refusals: Any = {status: {"model": ErrorBody} for status in ("4XX", "5XX")}
    routers = (_router(service), *(module.router for module in (chat, completions, responses, runs, tokens)))
    for router in routers:
        app.include_router(router, responses=refusals)
    app.state.routes = [route for router in routers for route in router.routes if isinstance(route, Route)]
    return Guard(app, service, keyring), service


def _router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> JSONResponse:
        """Whether it takes requests: engines are open, and it is not shutting down."""
        able = service.ready and not service.admission.draining
        state = "ready" if able else "shutting down" if service.admission.draining else "starting"
        return JSONResponse({"status": state}, status_code=200 if able else 503)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that are served; the first answers requests that name none."""
        return {"object": "list", "data": [_model(service, one) for one in service.served.values()]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str, asked: Annotated[Asked, Depends(asked)]) -> dict[str, Any]:
        """One of them."""
        return _model(service, asked.service.find(name))

    return router


def _model(service: Service, one: Served) -> dict[str, Any]:
    about = {**one.about(), "default": one is service.default}
    return {"id": one.name, "object": "model", "created": 0, "owned_by": "plait", "plait": about}


async def _plait_error(request: Request, exc: Exception) -> Response:
    # For the log.
    request.scope["state"]["failure"] = exc
    return JSONResponse(body_of(exc), status_code=status_of(exc), headers=getattr(exc, "headers", None))


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    words = {404: f"there is no {request.url.path[:100]!r}", 405: f"{request.method} is not possible here"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "invalid_request")
    refusal = Refusal(words.get(exc.status_code, str(exc.detail)), status=exc.status_code, code=code)
    headers = dict(exc.headers or {})
    if exc.status_code == 405:
        # The framework names the methods of the first route of this path; the others' are allowed too.
        routes = [route for route in request.app.state.routes if route.matches(request.scope)[0] is not Match.NONE]
        given = {method.strip() for method in headers.pop("Allow", "").split(",")} - {""}
        headers["Allow"] = ", ".join(sorted(given.union(*(route.methods or () for route in routes))))
    return JSONResponse(body_of(refusal), status_code=exc.status_code, headers=headers)


async def _invalid(_: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestValidationError)
    error = exc.errors()[0]
    where = [str(part) for part in error["loc"] if part != "body"]
    param = ".".join(where) or None
    unsupported = error["type"] in ("literal_error", "too_long", "none_required") and "plait" not in where[:1]
    message = f"{param}: {error['msg']}" if param else error["msg"]
    if error["type"] == "extra_forbidden":
        message = str(nearest(where[-1][:100], list(PlaitOptions.model_fields), "name in plait"))
    elif error["type"] == "json_invalid":
        message, param = f"the body is not JSON: {error['ctx']['error']}, at character {param}", None
    elif error["type"] == "none_required" or error.get("ctx", {}).get("max_length") == 0:
        message = f"{param} is not supported; leave it out"
    refusal = Refusal(message, code="unsupported_value" if unsupported else "invalid_value", param=param)
    return JSONResponse(body_of(refusal), status_code=400)


async def _failed(_: Request, exc: Exception) -> Response:
    return JSONResponse(body_of(exc), status_code=500)
