"""Routes of OpenAI's and vLLM's that clients try and this server hasn't: answered 404, naming what there is instead."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lookonce.core.errors import ErrorKind, LookonceError

CHAT = "/v1/chat/completions"
INSTEAD = {
    "/v1/responses": CHAT,
    "/v1/responses/{rest:path}": CHAT,
    "/v1/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/messages/{rest:path}": CHAT,
    "/v1/embeddings": "/v1/images, whose embeddings stay inside",
    "/v1/images/generations": "/v1/images, which takes pictures and makes none",
    "/v1/images/edits": "/v1/images, which takes pictures and makes none",
    "/v1/score": "/v1/images/{id}/questions with choices",
    "/v1/rerank": "/v1/images/{id}/questions with choices",
    "/tokenize": "the usage in each answer of " + CHAT,
    "/detokenize": CHAT,
}
"""Path templates, and what serves the purpose here."""
router = APIRouter(include_in_schema=False)


def _add(path: str, instead: str) -> None:
    async def unserved(request: Request) -> Response:
        text = f"this server has no {request.url.path[:100]}: use {instead}"
        raise LookonceError(ErrorKind.NOT_FOUND, text)

    others = () if path.startswith("/v1/images/") else ("GET", "HEAD", "DELETE")  # there they could be an image's
    router.add_api_route(path, unserved, methods=["POST", *others])


for _path, _instead in INSTEAD.items():
    _add(_path, _instead)
