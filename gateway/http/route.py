"""What a route knows of the request it serves."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from gateway.auth import Tenant
from gateway.conversation import Caller
from gateway.core import Gateway


def gateway_of(request: Request) -> Gateway:
    """The gateway that serves the request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def tenant_of(request: Request) -> Tenant:
    """Who the presented key belongs to."""
    tenant: Tenant = request.state.tenant
    return tenant


def caller_of(request: Request, user: str | None = None) -> Caller:
    """For the core: tenant, a client for fairness (the tenant and OpenAI's `user`), and the time allowed."""
    tenant = tenant_of(request)
    return Caller(tenant, f"{tenant.name}/{user or ''}", gateway_of(request).settings.request_timeout)


def json_response(content: Any, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(content), status, media_type="application/json")
