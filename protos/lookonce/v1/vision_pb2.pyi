from protos.lookonce.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CacheOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CACHE_OUTCOME_UNSPECIFIED: _ClassVar[CacheOutcome]
    HIT: _ClassVar[CacheOutcome]
    MISS: _ClassVar[CacheOutcome]
    COALESCED: _ClassVar[CacheOutcome]
CACHE_OUTCOME_UNSPECIFIED: CacheOutcome
HIT: CacheOutcome
MISS: CacheOutcome
COALESCED: CacheOutcome

class EncodeRequest(_message.Message):
    __slots__ = ("image", "tenant_key", "min_pixels", "max_pixels", "with_tensors", "ttl")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TENANT_KEY_FIELD_NUMBER: _ClassVar[int]
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    WITH_TENSORS_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    image: bytes
    tenant_key: bytes
    min_pixels: int
    max_pixels: int
    with_tensors: bool
    ttl: float
    def __init__(self, image: _Optional[bytes] = ..., tenant_key: _Optional[bytes] = ..., min_pixels: _Optional[int] = ..., max_pixels: _Optional[int] = ..., with_tensors: _Optional[bool] = ..., ttl: _Optional[float] = ...) -> None: ...

class EncodeTimings(_message.Message):
    __slots__ = ("queue_ms", "preprocess_ms", "encode_ms", "store_ms", "total_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    STORE_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    preprocess_ms: float
    encode_ms: float
    store_ms: float
    total_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., preprocess_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., store_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class EncodeResult(_message.Message):
    __slots__ = ("reference", "outcome", "timings", "stored", "record", "record_bytes_to_follow", "notice")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_TO_FOLLOW_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    reference: _common_pb2.ImageReference
    outcome: CacheOutcome
    timings: EncodeTimings
    stored: bool
    record: bytes
    record_bytes_to_follow: int
    notice: str
    def __init__(self, reference: _Optional[_Union[_common_pb2.ImageReference, _Mapping]] = ..., outcome: _Optional[_Union[CacheOutcome, str]] = ..., timings: _Optional[_Union[EncodeTimings, _Mapping]] = ..., stored: _Optional[bool] = ..., record: _Optional[bytes] = ..., record_bytes_to_follow: _Optional[int] = ..., notice: _Optional[str] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("result", "chunk")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    result: EncodeResult
    chunk: _common_pb2.RecordChunk
    def __init__(self, result: _Optional[_Union[EncodeResult, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.RecordChunk, _Mapping]] = ...) -> None: ...

class EncodeStreamRequest(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: EncodeRequest
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[EncodeRequest, _Mapping]] = ...) -> None: ...

class EncodeStreamResponse(_message.Message):
    __slots__ = ("id", "result", "chunk", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    result: EncodeResult
    chunk: _common_pb2.RecordChunk
    error: _common_pb2.Error
    def __init__(self, id: _Optional[int] = ..., result: _Optional[_Union[EncodeResult, _Mapping]] = ..., chunk: _Optional[_Union[_common_pb2.RecordChunk, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    def __init__(self, key: _Optional[bytes] = ...) -> None: ...

class VisionDescription(_message.Message):
    __slots__ = ("model", "fingerprint", "min_pixels", "max_pixels", "max_image_bytes", "max_source_pixels", "stream_window", "encodes", "hits", "coalesced", "least_pixels")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MIN_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SOURCE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    STREAM_WINDOW_FIELD_NUMBER: _ClassVar[int]
    ENCODES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    COALESCED_FIELD_NUMBER: _ClassVar[int]
    LEAST_PIXELS_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelDescription
    fingerprint: str
    min_pixels: int
    max_pixels: int
    max_image_bytes: int
    max_source_pixels: int
    stream_window: int
    encodes: int
    hits: int
    coalesced: int
    least_pixels: int
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelDescription, _Mapping]] = ..., fingerprint: _Optional[str] = ..., min_pixels: _Optional[int] = ..., max_pixels: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_source_pixels: _Optional[int] = ..., stream_window: _Optional[int] = ..., encodes: _Optional[int] = ..., hits: _Optional[int] = ..., coalesced: _Optional[int] = ..., least_pixels: _Optional[int] = ...) -> None: ...
