"""The ASGI application: routes, and what happens around them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.auth import Keyring
from gateway.core import Gateway
from gateway.http import batches, chat, files, images, moderations, openapi, playground, questions, service, uploads
from gateway.http.errors import on_http_exception, on_lookonce_error
from gateway.http.middleware import Authentication, Limits, RequestScope
from gateway.http.sse import ClientGone
from gateway.settings import distinct
from lookonce.errors import LookonceError


def create_app(gateway: Gateway, keyring: Keyring) -> tuple[ASGIApp, FastAPI]:
    """The application to serve, and the routes within it."""
    settings = gateway.settings
    app = FastAPI(title="lookonce", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    app.state.draining = False
    for part in (uploads, images, questions, chat, moderations, files, batches, service):
        app.include_router(part.router)
    if settings.playground:
        app.include_router(playground.make_router(settings.samples))
    openapi.install(app, with_keys=not keyring.open)
    app.add_exception_handler(LookonceError, on_lookonce_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientGone, _on_client_gone)
    stack: ASGIApp = Authentication(app, keyring)
    stack = Limits(stack, max_body_bytes=settings.max_body_bytes, max_concurrency=settings.max_concurrency)
    origins = distinct(settings.cors_origins)
    if origins:
        stack = CORSMiddleware(
            stack,
            origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "traceparent", "retry-after"],
        )
    return RequestScope(stack, access_log=settings.access_log), app


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the access log does
