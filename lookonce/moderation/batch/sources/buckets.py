"""Buckets through fsspec: how s3:// and gs:// are opened, and what their faults mean to the user.

Endpoints and credentials are found where AWS's and Google's own tools find them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lookonce.core.errors import ErrorKind, LookonceError, invalid


@dataclass(frozen=True)
class _Bucket:
    extra: str  # of lookonce, that brings the library
    endpoint: str  # environment variable
    remedy: str  # for credentials that are missing or not accepted
    rights: str  # that reading takes


_S3 = _Bucket(
    "s3",
    "AWS_ENDPOINT_URL",
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE; for a public bucket set "
    "FSSPEC_S3_ANON=true",
    "s3:ListBucket and s3:GetObject",
)
_GCS = _Bucket(
    "gcs",
    "STORAGE_EMULATOR_HOST",
    "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run `gcloud auth application-default login`",
    "storage.objects.list and storage.objects.get",
)
BUCKETS = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS}
"""By scheme."""
_NOT_ACCEPTED = frozenset({
    # What the libraries raise
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError", "TokenRetrievalError", "DefaultCredentialsError", "RefreshError",
    # What the servers say
    "401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "RequestTimeTooSkewed", "AuthFailure",
})  # fmt: skip
_BEYOND_THE_END = frozenset({"416", "InvalidRange"})
_DENIED = frozenset({"403", "AccessDenied", "AllAccessDisabled", "AccountProblem"})


def open_bucket(scheme: str) -> Any:
    """The fsspec file system of a scheme in BUCKETS. Raises INVALID_ARGUMENT when its package is missing."""
    kind = BUCKETS[scheme]
    try:
        if kind is _GCS:
            # Its class for the JSON API: the other asks for each bucket's type over gRPC first, which emulators and
            # proxies leave unanswered for a minute.
            from gcsfs.core import GCSFileSystem

            # An emulator asks for no credentials; looking for some would take seconds.
            token = "anon" if os.environ.get(kind.endpoint) else None
            return GCSFileSystem(token=token, use_listings_cache=False)
        import fsspec

        return fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError as error:
        text = f"{scheme}:// needs a package that is not installed: pip install 'lookonce[{kind.extra}]'"
        raise invalid(text, param="source") from error
    except Exception as error:  # foreign: a profile that isn't there, a key file that is none
        raise fault(f"{scheme}://", scheme, error) from error


def read_object(filesystem: Any, path: str, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on, in one request: asking for the size first would be another, whose answer
    does not say why a server refuses."""
    try:
        data: bytes = filesystem.cat_file(path, start=offset, end=offset + size)
    except Exception as error:
        if _words(error) & _BEYOND_THE_END:
            return b""
        raise
    return data


def fault(name: str, scheme: str, error: Exception) -> LookonceError:
    """What a library's exception means. UNAUTHENTICATED is of the whole run, the others are of the one file."""
    kind, words = BUCKETS[scheme], _words(error)
    if words & _NOT_ACCEPTED:
        said = min(words & _NOT_ACCEPTED)
        text = f"{name}: no credentials that the bucket's server accepts ({said}): {kind.remedy}"
        return LookonceError(ErrorKind.UNAUTHENTICATED, text, param="source")
    if isinstance(error, PermissionError) or words & _DENIED or str(error).startswith("Forbidden"):
        text = f"{name}: the credentials do not allow reading it, which takes {kind.rights}"
        return LookonceError(ErrorKind.PERMISSION_DENIED, text, param="source")
    endpoint = os.environ.get(kind.endpoint)
    where = f" ({kind.endpoint} is {endpoint})" if endpoint else ""
    if "ParamValidationError" in words:
        return invalid(f"{name} is no valid name of a bucket", param="source")
    if isinstance(error, ValueError):
        return invalid(f"{name}: cannot be asked for{where}", param="source")
    return LookonceError(ErrorKind.UNAVAILABLE, f"{name}: cannot be read right now{where}", param="source")


def _words(error: BaseException) -> set[str]:
    """The kinds and codes by which an exception, and what caused it, go."""
    words: set[str] = set()
    cause: BaseException | None = error
    while cause is not None:
        words.add(type(cause).__name__)
        response = getattr(cause, "response", None)  # botocore's
        if isinstance(response, dict):
            words.add(str(response.get("Error", {}).get("Code")))
        words.add(str(getattr(cause, "code", "")))  # gcsfs's
        cause = cause.__cause__
    return words
