"""Serialisation of checkpoints: tensors as safetensors, the training state as JSON; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pvae.errors import CheckpointError
from pvae.util.files import MIB

LARGEST_STATE = 16 * MIB
"""Largest size (bytes) of a training state or a manifest."""

_ESCAPE = "json:"
DTYPES = frozenset(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]
    + [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8]
    + [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
)


def wrong(where: Path, expected: str, found: object) -> CheckpointError:
    """Return a CheckpointError for a file: `where`: expected `expected`; got `found`."""
    return CheckpointError(f"{where}: expected {expected}; got {found}.")


def pack_tensors(group: str, entries: Mapping[str, Tensor]) -> bytes:
    """Return named tensors as the bytes of a safetensors file; raises CheckpointError, which names the group."""
    seen: set[int] = set()
    try:
        return safetensors.torch.save({_escaped(key): _detached(value, seen) for key, value in entries.items()})
    except (SafetensorError, ValueError, RuntimeError, NotImplementedError) as problem:
        raise CheckpointError(f"{group}: expected dense tensors that safetensors can hold; got: {problem}") from problem


def _detached(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return a detached contiguous tensor on the CPU with its own storage, since safetensors refuses shared storage."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"dtype {tensor.dtype}, which could not be read back")
    dense = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    address = dense.untyped_storage().data_ptr()
    if address in seen:
        return dense.clone()
    seen.add(address)
    return dense


def _escaped(key: str) -> str:
    """Return a tensor's name, escaped if safetensors would not preserve it (lone surrogates, ``__metadata__``)."""
    plain = key.encode(errors="ignore").decode() == key
    return key if plain and key != "__metadata__" and not key.startswith(_ESCAPE) else _ESCAPE + json.dumps(key)


def _unescaped(key: str) -> str:
    return str(json.loads(key.removeprefix(_ESCAPE))) if key.startswith(_ESCAPE) else key


def pack_state(state: Mapping[str, Any]) -> bytes:
    """Return a training state as JSON bytes; raises CheckpointError if reading them would not give an equal state."""
    _require_text_keys(state)
    try:
        content = json.dumps(state, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"Expected a state of finite JSON; got: {problem}") from problem
    if len(content) > LARGEST_STATE:
        raise CheckpointError(
            f"Expected a state of at most {LARGEST_STATE} bytes; got {len(content)}. Keep arrays as tensors."
        )
    return content


def _require_text_keys(value: object) -> None:
    """Refuse dicts with keys that are not strings, which JSON would silently convert to strings."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"Expected text as keys of the state; got {key!r}.")
            _require_text_keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _require_text_keys(item)


def unpack_tensors(where: Path, content: bytes) -> dict[str, Tensor]:
    """Return the named tensors in the bytes of a safetensors file; raises CheckpointError."""
    try:
        return {_unescaped(key): value for key, value in safetensors.torch.load(content).items()}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as problem:
        raise wrong(where, "safetensors", f"{len(content)} bytes that start {content[:16]!r} ({problem})") from problem
