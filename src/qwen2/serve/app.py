"""The application: routes, errors in OpenAI's words, and the guard around all of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import qwen2
from qwen2.inference import EngineThread
from qwen2.serve import chat, completions, embeddings, responses, tokens
from qwen2.serve.errors import ApiError, Json, of_validation
from qwen2.serve.guard import Guard
from qwen2.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from qwen2.serve.service import Service
from qwen2.serve.settings import Settings

PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/render.js": ("render.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

_BODIES: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    responses.ResponseRequest,
)


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


def create_app(engine: EngineThread, settings: Settings) -> ASGIApp:
    """The server of an engine that has been started; who made it stops it.

    Raises:
        UserError: the checkpoint's chat template can't be used.
    """
    service = Service(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody}
        for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 500, 503)
    }
    app = FastAPI(
        title="qwen2",
        version=qwen2.__version__,
        docs_url=None,  # FastAPI's pages take their scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=errors,
    )
    for part in (chat, completions, embeddings, responses, tokens):
        app.include_router(part.router(service))
    app.include_router(_status(service))
    app.include_router(_page())
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    open_paths = frozenset({"/health", *PAGE})
    return Guard(_Counted(app, service), settings, open_paths)


def _schema(app: FastAPI) -> dict[str, Any]:
    """FastAPI's schema, with our keys, and without the 422 that never comes."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        parts = schema["components"]
        for name in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema


def _status(service: Service) -> APIRouter:
    routes = APIRouter()
    models = [
        {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "qwen2",
            "root": service.settings.names[0],
            "max_model_len": service.context,
        }
        for name in service.settings.names
    ]

    @routes.get("/v1/models")
    async def list_models() -> Response:
        """The one model that is here, under each of its names."""
        return Json({"object": "list", "data": models})

    @routes.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        """What is known of a model."""
        return Json(models[service.settings.names.index(service.check_model(model))])

    @routes.get("/health")
    async def health() -> Response:
        """200 while the engine works, else 503."""
        alive = service.engine.alive
        return Json({"status": "ok" if alive else "the engine is dead"}, 200 if alive else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return routes


def _page() -> APIRouter:
    """The chat page. It needs no key, for it says nothing; all that it asks for does."""
    routes = APIRouter(include_in_schema=False)
    folder = resources.files("qwen2.serve") / "page"
    for path, (name, kind) in PAGE.items():
        content = (folder / name).read_bytes()

        def send(content: bytes = content, kind: str = kind) -> Response:
            return Response(
                content, headers={"content-type": kind, "content-security-policy": PAGE_POLICY}
            )

        routes.add_api_route(path, _without_parameters(send), methods=["GET"])
    return routes


def _without_parameters(send: Any) -> Any:
    """FastAPI would take defaults for query parameters."""

    async def endpoint() -> Response:
        response: Response = send()
        return response

    return endpoint


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = {name for body in _BODIES for name in body.model_fields}
    return of_validation(error.errors(), sorted(fields)).response()


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        told = {
            404: "there is nothing at this path; the API is at /v1, and /openapi.json lists all",
            405: "this path has no such method",
        }
        message = told.get(error.status_code, str(error.detail))
        error = ApiError(error.status_code, message, headers=error.headers)
    return error.response()


async def _on_bug(_: Request, error: Exception) -> Response:
    """A bug of ours: the server logs it, and the client learns nothing of it."""
    return ApiError(500, "something went wrong in the server").response()


class _Counted:
    """Counts answers by route, for the metrics; and answers HEAD as GET, without the body."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET"}  # uvicorn, which knows better, sends no body

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The route's own path, not the one asked for: strangers must not make labels.
                route = getattr(scope.get("route"), "path", "none")
                self._metrics.answered(route, message["status"])
            await send(message)

        await self._app(scope, receive, sending)
