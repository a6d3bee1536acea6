"""The ASGI application: routes, and what happens around them."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from gateway.auth import Keyring
from gateway.core import Gateway
from gateway.http import (
    batch_routes,
    chat_routes,
    embedding_routes,
    image_routes,
    messages_routes,
    moderation_routes,
    ollama_routes,
    openapi,
    playground,
    question_routes,
    responses_routes,
    status_routes,
    systemone_routes,
)
from gateway.http.error_bodies import on_client_gone, on_http_exception, on_lookonce_error, on_unforeseen
from gateway.http.middleware import Authentication, Cors, Intake, OriginCheck, RequestScope
from gateway.http.route import ClientGone, on_query_error
from gateway.settings import distinct
from lookonce.core.errors import LookonceError

ROUTERS = (
    embedding_routes.router,
    image_routes.router,
    question_routes.router,
    chat_routes.router,
    responses_routes.router,
    messages_routes.router,
    ollama_routes.router,
    systemone_routes.router,
    moderation_routes.router,
    batch_routes.files,
    batch_routes.batches,
    status_routes.models,
    status_routes.operation,
    status_routes.unserved,
)


def create_app(gateway: Gateway, keyring: Keyring) -> tuple[ASGIApp, FastAPI]:
    """The application to serve, and the routes within it."""
    settings = gateway.settings
    app = FastAPI(
        **openapi.ABOUT,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=openapi.operation_id,
        exception_handlers={
            LookonceError: on_lookonce_error,
            RequestValidationError: on_query_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
            ClientDisconnect: on_client_gone,
            Exception: on_unforeseen,
        },
    )
    app.state.gateway = gateway
    app.state.draining = False
    for router in ROUTERS:
        app.include_router(router)
    if settings.playground:
        app.include_router(playground.make_router(settings.samples))
    openapi.complete(app, with_keys=not keyring.open)
    stack: ASGIApp = Authentication(app, keyring)
    stack = Intake(stack, settings)
    origins = distinct(settings.cors_origins)
    if origins:
        stack = Cors(
            stack,
            origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "traceparent", "retry-after"],
        )
    if keyring.open and settings.uds is None:
        hosts = (settings.host, *distinct(settings.allowed_hosts))
        stack = OriginCheck(stack, hosts=hosts, origins=origins)
    return RequestScope(stack, access_log=settings.access_log), app
