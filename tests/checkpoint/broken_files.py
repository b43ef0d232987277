"""Safetensors files with any header, right or wrong."""

import json
from typing import Any


def raw_file(header: object, data: bytes = b"") -> bytes:
    """The bytes of a file; `header` is JSON to be written, or bytes to be taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def fields(dtype: object, shape: object, start: object, end: object) -> dict[str, Any]:
    """What a header says about one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
