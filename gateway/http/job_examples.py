"""Examples for the OpenAPI document: moderations, files and batches."""

from __future__ import annotations

from typing import Any

from gateway.http.examples import IMAGE_ID, RECEIPT

MODERATIONS = {
    "text": {"input": "A knife made for fighting, hardly used."},
    "a picture uploaded before, and its caption": {
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
FILES = {"object": "list", "data": [FILE], "first_id": FILE_ID, "last_id": FILE_ID, "has_more": False}
DELETED = {"id": FILE_ID, "object": "file", "deleted": True}
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
BATCH_LIST = {"object": "list", "data": [BATCH], "first_id": BATCH_ID, "last_id": BATCH_ID, "has_more": False}
