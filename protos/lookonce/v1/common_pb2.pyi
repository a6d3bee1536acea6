from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ErrorKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_KIND_UNSPECIFIED: _ClassVar[ErrorKind]
    INVALID_ARGUMENT: _ClassVar[ErrorKind]
    UNSUPPORTED: _ClassVar[ErrorKind]
    IMAGE_INVALID: _ClassVar[ErrorKind]
    IMAGE_TOO_LARGE: _ClassVar[ErrorKind]
    PAYLOAD_TOO_LARGE: _ClassVar[ErrorKind]
    CONTEXT_LENGTH_EXCEEDED: _ClassVar[ErrorKind]
    UNAUTHENTICATED: _ClassVar[ErrorKind]
    PERMISSION_DENIED: _ClassVar[ErrorKind]
    NOT_FOUND: _ClassVar[ErrorKind]
    CONFLICT: _ClassVar[ErrorKind]
    EMBEDDING_MISSING: _ClassVar[ErrorKind]
    EMBEDDING_INVALID: _ClassVar[ErrorKind]
    FINGERPRINT_MISMATCH: _ClassVar[ErrorKind]
    CHECKPOINT_INVALID: _ClassVar[ErrorKind]
    RATE_LIMITED: _ClassVar[ErrorKind]
    OVERLOADED: _ClassVar[ErrorKind]
    UNAVAILABLE: _ClassVar[ErrorKind]
    DEADLINE_EXCEEDED: _ClassVar[ErrorKind]
    CANCELLED: _ClassVar[ErrorKind]
    INTERNAL: _ClassVar[ErrorKind]
ERROR_KIND_UNSPECIFIED: ErrorKind
INVALID_ARGUMENT: ErrorKind
UNSUPPORTED: ErrorKind
IMAGE_INVALID: ErrorKind
IMAGE_TOO_LARGE: ErrorKind
PAYLOAD_TOO_LARGE: ErrorKind
CONTEXT_LENGTH_EXCEEDED: ErrorKind
UNAUTHENTICATED: ErrorKind
PERMISSION_DENIED: ErrorKind
NOT_FOUND: ErrorKind
CONFLICT: ErrorKind
EMBEDDING_MISSING: ErrorKind
EMBEDDING_INVALID: ErrorKind
FINGERPRINT_MISMATCH: ErrorKind
CHECKPOINT_INVALID: ErrorKind
RATE_LIMITED: ErrorKind
OVERLOADED: ErrorKind
UNAVAILABLE: ErrorKind
DEADLINE_EXCEEDED: ErrorKind
CANCELLED: ErrorKind
INTERNAL: ErrorKind

class Error(_message.Message):
    __slots__ = ("kind", "message", "param", "retry_after")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    kind: ErrorKind
    message: str
    param: str
    retry_after: float
    def __init__(self, kind: _Optional[_Union[ErrorKind, str]] = ..., message: _Optional[str] = ..., param: _Optional[str] = ..., retry_after: _Optional[float] = ...) -> None: ...

class Grid(_message.Message):
    __slots__ = ("t", "h", "w")
    T_FIELD_NUMBER: _ClassVar[int]
    H_FIELD_NUMBER: _ClassVar[int]
    W_FIELD_NUMBER: _ClassVar[int]
    t: int
    h: int
    w: int
    def __init__(self, t: _Optional[int] = ..., h: _Optional[int] = ..., w: _Optional[int] = ...) -> None: ...

class ImageReference(_message.Message):
    __slots__ = ("key", "fingerprint", "image_digest", "grid", "tokens", "width", "height", "record_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    fingerprint: str
    image_digest: bytes
    grid: Grid
    tokens: int
    width: int
    height: int
    record_bytes: int
    def __init__(self, key: _Optional[bytes] = ..., fingerprint: _Optional[str] = ..., image_digest: _Optional[bytes] = ..., grid: _Optional[_Union[Grid, _Mapping]] = ..., tokens: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., record_bytes: _Optional[int] = ...) -> None: ...

class RecordChunk(_message.Message):
    __slots__ = ("data", "offset", "total")
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    offset: int
    total: int
    def __init__(self, data: _Optional[bytes] = ..., offset: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class ForgetRequest(_message.Message):
    __slots__ = ("keys", "image_digests")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    image_digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., image_digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ForgetResponse(_message.Message):
    __slots__ = ("forgotten", "complete")
    FORGOTTEN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    forgotten: int
    complete: bool
    def __init__(self, forgotten: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelDescription(_message.Message):
    __slots__ = ("name", "checkpoint", "family", "dtype", "device", "hidden_size", "merge_size", "weight_bytes", "version", "instance", "started_at", "quantization", "vision_weights")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MERGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    VISION_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    checkpoint: str
    family: str
    dtype: str
    device: str
    hidden_size: int
    merge_size: int
    weight_bytes: int
    version: str
    instance: str
    started_at: float
    quantization: str
    vision_weights: str
    def __init__(self, name: _Optional[str] = ..., checkpoint: _Optional[str] = ..., family: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., hidden_size: _Optional[int] = ..., merge_size: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., version: _Optional[str] = ..., instance: _Optional[str] = ..., started_at: _Optional[float] = ..., quantization: _Optional[str] = ..., vision_weights: _Optional[str] = ...) -> None: ...
