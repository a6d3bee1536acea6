"""Imported by the process that services are forked from (tests.forked): what takes long, and nothing of ours."""

import gc
from importlib import import_module

for name in (
    "grpc.aio", "grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "jinja2", "numpy", "PIL.Image",
    "prometheus_client", "pydantic_settings", "redis.asyncio", "structlog", "tokenizers", "torch",
    "transformers.modeling_utils", "typer", "uvloop",
):  # fmt: skip
    import_module(name)
gc.freeze()  # no collection in a service walks over all of that
