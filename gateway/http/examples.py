"""Examples for the OpenAPI document: one image, asked about. Tests hold them against the schemas."""

from __future__ import annotations

from typing import Any

from gateway.http.event_stream import DONE, event
from gateway.http.route import list_object

IMAGE_ID = "img_" + "k2fz5m7q" * 6 + "abcd"
IMAGE: dict[str, Any] = {
    "id": IMAGE_ID,
    "object": "image",
    "bytes": 48213,
    "width": 640,
    "height": 480,
    "tokens": 391,
    "status": "ready",
    "created_at": 1790000000,
    "expires_at": 1790604800,
    "pinned": False,
    "aliases": ["front-door"],
}
UPLOADS = {
    "base64": {"data": "iVBORw0KGgoAAAANSUhEUgAA..."},
    "by URL, kept for an hour": {"url": "https://example.com/door.jpg", "ttl": 3600},
    "pinned, with a name": {"url": "https://example.com/door.jpg", "pinned": True, "alias": "front-door"},
}
CHANGES = {"keep it until it is erased": {"pinned": True}, "an hour from now": {"pinned": False, "ttl": 3600}}

USAGE = {
    "prompt_tokens": 412,
    "completion_tokens": 3,
    "total_tokens": 415,
    "prompt_tokens_details": {"cached_tokens": 400, "image_tokens": 391},
}
RECEIPT = {
    "embedding": "hit",
    "prefix": "hit",
    "encode_ms": 0.0,
    "prefill_tokens": 12,
    "cached_tokens": 400,
    "queue_ms": 0.1,
    "ttft_ms": 8.7,
    "model": "qwen2-vl-2b-instruct",
    "fingerprint": "9c" * 32,
}
ANSWER: dict[str, Any] = {"id": "0", "text": "A red door.", "finish_reason": "stop", "usage": USAGE, "receipt": RECEIPT}
CHOSEN = ANSWER | {
    "id": "open",
    "text": "no",
    "choices": {"yes": 0.04, "no": 0.96},
    "logprobs": {"yes": -3.2, "no": -0.04},
}
ASKED = {"object": "list", "image": IMAGE_ID, "model": RECEIPT["model"], "answers": [ANSWER, CHOSEN]}
QUESTIONS = {
    "two questions": {"questions": ["What is this?", "What colour is it?"], "max_tokens": 32},
    "choices": {"questions": [{"id": "open", "text": "Is it open?", "choices": ["yes", "no"]}]},
}

_ENVELOPE = {"id": "chatcmpl-0b1e", "created": 1790000000, "model": RECEIPT["model"]}
COMPLETION: dict[str, Any] = _ENVELOPE | {
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "A red door.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
    "system_fingerprint": "fp_" + "9c" * 8,
    "receipt": RECEIPT,
}


def _chunk(delta: dict[str, Any], reason: str | None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return _ENVELOPE | {"object": "chat.completion.chunk", "choices": [choice]} | more


CHUNKS = [
    _chunk({"role": "assistant", "content": ""}, None),
    _chunk({"content": "A red door."}, None),
    _chunk({}, "stop", receipt=RECEIPT),
]
CHATS = {
    "text": {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16},
    "an image uploaded before": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"lookonce:{IMAGE_ID}"}},
                    {"type": "text", "text": "What is this?"},
                ],
            }
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
}
MODEL = {
    "id": RECEIPT["model"],
    "object": "model",
    "created": 1790000000,
    "owned_by": "lookonce",
    "family": "qwen2_vl",
    "context_length": 32768,
    "max_tokens": 4096,
    "sampling_defaults": {"temperature": 0.01, "top_p": 0.001},
    "engine": "packed",
    "engine_note": "",
}
READINESS = {
    "status": "ready",
    "parts": {
        "language": {"serving": 2, "configured": 2},
        "vision": {"serving": 1, "configured": 1},
        "image_store": "ok",
    },
}
METRICS = '# TYPE lookonce_gateway_requests_total counter\nlookonce_gateway_requests_total{route="/v1/models"} 3.0\n'
MODERATIONS = {
    "text": {"input": "A knife made for fighting, hardly used."},
    "an image uploaded before, and its caption": {
        "input": [
            {"type": "image_url", "image_url": {"url": f"lookonce:{IMAGE_ID}"}},
            {"type": "text", "text": "My kitchen."},
        ]
    },
}
MODERATION: dict[str, Any] = {
    "id": "modr-5f0e",
    "model": RECEIPT["model"],
    "results": [
        {
            "flagged": True,
            "categories": {"weapons": True, "nudity": False},
            "category_scores": {"weapons": 0.93, "nudity": 0.004},
            "category_applied_input_types": {"weapons": ["image", "text"], "nudity": ["image"]},
            "severity": "high",
            "follow_ups": {"weapons": ["A hunting knife."]},
            "receipt": RECEIPT,
        }
    ],
}
EMBEDDING_MODEL = "gme-qwen2-vl-2b-instruct"
VECTOR_COST = {
    "usage": {"prompt_tokens": 437, "total_tokens": 437, "prompt_tokens_details": {"image_tokens": 391}},
    "receipt": {"encoded": 0, "prefill_tokens": 23, "kept": 1},
}
INPUTS = {
    "text": {"input": "a red door"},
    "texts and images": {"input": ["a red door", {"image": IMAGE_ID}, {"text": "my door", "image": IMAGE_ID}]},
    "a query with an instruction": {"input": "a red door", "instruction": "Find an image that matches the given text."},
}
EMBEDDINGS: dict[str, Any] = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
    "model": EMBEDDING_MODEL,
    **VECTOR_COST,
}
RERANKS = {
    "images and a text": {
        "query": "a red door",
        "documents": [{"image": IMAGE_ID}, "A blue gate."],
        "top_n": 1,
    }
}
RERANKED: dict[str, Any] = {
    "id": "rerank-5f0e",
    "model": EMBEDDING_MODEL,
    "results": [{"index": 0, "relevance_score": 0.61, "document": {"image": IMAGE_ID}}],
    **VECTOR_COST,
}
SEARCHES = {
    "by a text": {"query": "a red door", "top_n": 5},
    "images like this one": {"query": {"image": IMAGE_ID}, "top_n": 5},
}
FOUND: dict[str, Any] = {
    "object": "list",
    "model": EMBEDDING_MODEL,
    "data": [{"id": IMAGE_ID, "score": 0.61, "image": IMAGE}],
    "searched": 30,
    "skipped": [],
    "last_id": IMAGE_ID,
    "has_more": False,
    **VECTOR_COST,
}
FILE_ID, OUTPUT_ID, BATCH_ID = "file-" + "3b" * 16, "file-" + "7d" * 16, "batch_" + "c4" * 16
FILE: dict[str, Any] = {
    "id": FILE_ID,
    "object": "file",
    "bytes": 5120,
    "created_at": 1790000000,
    "expires_at": 1792592000,
    "filename": "requests.jsonl",
    "purpose": "batch",
    "status": "processed",
    "status_details": None,
}
BATCHES = {
    "chat completions": {
        "input_file_id": FILE_ID,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"run": "nightly"},
    }
}
BATCH: dict[str, Any] = {
    "id": BATCH_ID,
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "status": "completed",
    "errors": None,
    "input_file_id": FILE_ID,
    "completion_window": "24h",
    "output_file_id": OUTPUT_ID,
    "error_file_id": None,
    "created_at": 1790000000,
    "expires_at": 1790086400,
    "in_progress_at": 1790000001,
    "finalizing_at": 1790000060,
    "completed_at": 1790000060,
    "failed_at": None,
    "expired_at": None,
    "cancelling_at": None,
    "cancelled_at": None,
    "request_counts": {"total": 20, "completed": 20, "failed": 0},
    "metadata": {"run": "nightly"},
    "usage": {
        "input_tokens": 24000,
        "input_tokens_details": {"cached_tokens": 20500},
        "output_tokens": 310,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 24310,
    },
}
RESPONSE: dict[str, Any] = {
    "id": "resp_1c2e6d",
    "object": "response",
    "created_at": 1790000000,
    "status": "completed",
    "error": None,
    "incomplete_details": None,
    "instructions": "Be brief.",
    "max_output_tokens": 32,
    "metadata": {},
    "model": "qwen2-vl-2b-instruct",
    "output": [
        {
            "type": "message",
            "id": "msg_7a90c1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "A red door.", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 412,
        "input_tokens_details": {"cached_tokens": 400},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 415,
    },
    "user": None,
    "receipt": RECEIPT,
}
RESPONSES: dict[str, dict[str, Any]] = {
    "an image": {
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": f"lookonce:{IMAGE_ID}"},
                    {"type": "input_text", "text": "What is this?"},
                ],
            }
        ],
        "max_output_tokens": 32,
    },
    "a next turn": {"previous_response_id": "resp_1c2e6d", "input": "What colour is it?"},
}
MESSAGE: dict[str, Any] = {
    "id": "msg_9d1f42",
    "type": "message",
    "role": "assistant",
    "model": "qwen2-vl-2b-instruct",
    "content": [{"type": "text", "text": "A red door.", "citations": None}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 12,
        "output_tokens": 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 400,
    },
    "receipt": RECEIPT,
}
MESSAGE_EVENTS: list[dict[str, Any]] = [
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "A red door."}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_stop"},
]
MESSAGES: dict[str, dict[str, Any]] = {
    "an image": {
        "max_tokens": 32,
        "system": "Be brief.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "url", "url": f"lookonce:{IMAGE_ID}"}},
                    {"type": "text", "text": "What is this?"},
                ],
            }
        ],
    }
}
OLLAMA_ANSWER: dict[str, Any] = {
    "model": "lookonce",
    "created_at": "2026-12-01T12:00:00+00:00",
    "message": {"role": "assistant", "content": "A red door."},
    "done": True,
    "done_reason": "stop",
    "total_duration": 21000000,
    "load_duration": 0,
    "prompt_eval_count": 412,
    "prompt_eval_duration": 8700000,
    "eval_count": 3,
    "eval_duration": 12300000,
    "receipt": RECEIPT,
}
OLLAMA_CHATS: dict[str, dict[str, Any]] = {
    "an image": {
        "model": "lookonce",
        "messages": [{"role": "user", "content": "What is this?", "images": ["iVBORw0KGgoAAAANSUhEUgAA..."]}],
        "stream": False,
    }
}
OLLAMA_PROMPTS: dict[str, dict[str, Any]] = {
    "an image": {
        "model": "lookonce",
        "prompt": "What is this?",
        "images": ["iVBORw0KGgoAAAANSUhEUgAA..."],
        "stream": False,
    }
}
STATES: dict[str, dict[str, Any]] = {
    "an image": {
        "model": "lookonce",
        "state": "A photograph: door-1",
        "assets": {"door-1": {"type": "image", "format": "png", "data_base64": "iVBORw0KGgoAAAANSUhEUgAA..."}},
        "questions": {
            "open": {"type": "noul", "instructions": "Is the door open?"},
            "colour": {"type": "choice", "instructions": "Which colour?", "criteria": {"red": None, "green": None}},
            "wear": {"type": "score", "instructions": "How worn is it?", "criteria": ["like new", "used", "worn"]},
        },
    }
}
DECIDED: dict[str, Any] = {
    "model": "qwen2-vl-2b-instruct",
    "answers": {
        "open": {"type": "noul", "noul": 0.04},
        "colour": {
            "type": "choice",
            "choice": "red",
            "confidence": 0.97,
            "probabilities": {"red": 0.97, "green": 0.03},
        },
        "wear": {
            "type": "score",
            "score": 0.6,
            "confidence": 0.5,
            "probabilities": {"0": 0.5, "1": 0.4, "2": 0.1},
            "legend": {"0": "like new", "1": "used", "2": "worn"},
        },
    },
    "usage": {"input_tokens": 1290, "output_tokens": 0},
    "receipt": RECEIPT,
}
BODIES: dict[str, dict[str, Any]] = {
    "uploadImage": UPLOADS,
    "changeImage": CHANGES,
    "askQuestions": QUESTIONS,
    "createChatCompletion": CHATS,
    "createResponse": RESPONSES,
    "answerSystemOne": STATES,
    "createMessage": MESSAGES,
    "ollamaChat": OLLAMA_CHATS,
    "ollamaGenerate": OLLAMA_PROMPTS,
    "createEmbeddings": INPUTS,
    "rerank": RERANKS,
    "searchImages": SEARCHES,
    "createModeration": MODERATIONS,
    "createBatch": BATCHES,
}
"""Of requests, by the id of the operation and what they show."""
ANSWERS: dict[str, Any] = {
    "uploadImage": IMAGE | {"cached": False, "encode_ms": 182.4},
    "listImages": list_object([IMAGE], more=False),
    "getImage": IMAGE,
    "changeImage": IMAGE,
    "eraseImage": {"id": IMAGE_ID, "object": "image", "deleted": True, "complete": True},
    "dropAlias": IMAGE | {"aliases": []},
    "askQuestions": ASKED,
    "createChatCompletion": COMPLETION,
    "createResponse": RESPONSE,
    "answerSystemOne": DECIDED,
    "createMessage": MESSAGE,
    "ollamaChat": OLLAMA_ANSWER,
    "ollamaGenerate": {**OLLAMA_ANSWER, "message": None, "response": "A red door."},
    "ollamaTags": {
        "models": [
            {
                "name": "lookonce",
                "model": "lookonce",
                "modified_at": "1970-01-01T00:00:00+00:00",
                "size": 0,
                "digest": "",
                "details": {"family": "", "format": "safetensors", "parameter_size": "", "quantization_level": ""},
            }
        ]
    },
    "getResponse": RESPONSE,
    "deleteResponse": {"id": RESPONSE["id"], "object": "response", "deleted": True},
    "createEmbeddings": EMBEDDINGS,
    "rerank": RERANKED,
    "searchImages": FOUND,
    "createModeration": MODERATION,
    "createFile": FILE,
    "listFiles": list_object([FILE], more=False),
    "getFile": FILE,
    "deleteFile": {"id": FILE_ID, "object": "file", "deleted": True},
    "createBatch": BATCH,
    "listBatches": list_object([BATCH], more=False),
    "getBatch": BATCH,
    "cancelBatch": BATCH,
    "listModels": {"object": "list", "data": [MODEL]},
    "getModel": MODEL,
    "health": {"status": "ok"},
    "readiness": READINESS,
    "healthOfAll": READINESS,
    "version": {"version": "0.7.0"},
}
"""Of answers in JSON, by the id of the operation."""


def events(*items: dict[str, Any], named: bool = False) -> str:
    """The items as a stream of server-sent events."""
    if named:
        return b"".join(f"event: {item['type']}\n".encode() + event(item) for item in items).decode()
    return b"".join([*map(event, items), DONE]).decode()
