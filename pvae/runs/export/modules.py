"""Export of a fitted decoder or encoder into one file that runs, or is read, without pvae and Pyro."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch

from pvae import __version__
from pvae.errors import DeclarationError, PvaeError, require_extra
from pvae.runs.checkpoint import pack_tensors
from pvae.runs.export.exporting import brief
from pvae.runs.run import Run
from pvae.util import write_atomic

if TYPE_CHECKING:
    from pvae.analysis.samples.modules import PlainModule


def program(module: PlainModule) -> torch.export.ExportedProgram:
    """Return a Module as a program of torch.export, of any batch size, which reads the names of inputs here."""
    call: Any = partial(module.forward)
    call.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in module.inputs])
    module.forward = call  # type: ignore[method-assign]
    given, shapes = module.example(3), dict.fromkeys(module.inputs, {0: torch.export.Dim("batch")})
    args = () if module.alone is None else (given.pop(module.alone),)
    with pyro.validation_enabled(False):  # a program has no checks of values
        return torch.export.export(module, args, given, dynamic_shapes=shapes)


def to_pt2(module: PlainModule, facts: dict[str, str]) -> bytes:
    """Return a Module as `torch.export.save` writes it, with the facts as the extra file `pvae.json`."""
    buffer = io.BytesIO()
    torch.export.save(program(module), buffer, extra_files={"pvae.json": json.dumps(facts)})
    return buffer.getvalue()


def to_onnx(module: PlainModule, facts: dict[str, str]) -> bytes:
    """Return a Module as an ONNX model, with the facts as its metadata."""
    require_extra("onnxscript", "onnx", "export: expected onnxscript, which writes .onnx")
    names: dict[str, Any] = {"input_names": list(module.inputs), "output_names": list(module.outputs)}
    found: Any = torch.onnx.export(program(module), verbose=False, **names)
    found.model.metadata_props.update(facts)
    return bytes(found.model_proto.SerializeToString())


FORMATS: Mapping[str, Callable[[PlainModule, dict[str, str]], bytes]] = {
    ".pt2": to_pt2,
    ".onnx": to_onnx,
    ".safetensors": lambda module, facts: pack_tensors(module.side, module.state_dict(), facts),
}
"""Function from a Module and facts about it to the content of a file, by the ending of its name."""


def export_module(run: Run, path: Path, what: str = "decoder") -> Path:
    """Write the decoder or encoder of a run into one file, which replaces an earlier one at once; return its path.

    - `.pt2`: a program of torch: `torch.export.load(path).module()` is called as the Module is, with any batch size.
    - `.onnx`: inputs and outputs have the names of the variables, such as z and x; their batch size is free.
    - `.safetensors`: the weights, by the names of the Module's `state_dict`.

    Inputs are those of `run.decoder.expected` in the type of the weights; codes are int64 and not checked. Beside it
    stand facts as text: the declaration (TOML), the shape of a datum (JSON), inputs, name, version of pvae; in the
    extra file `pvae.json` of a `.pt2`, else in the metadata.

    Raises:
        DeclarationError: the ending is another, or the Module cannot be written in that format.
        MissingExtraError: `.onnx` without onnxscript.
        StorageError: the file cannot be written.
    """
    if path.suffix not in FORMATS or what not in ("decoder", "encoder"):
        raise DeclarationError(f"export: expected decoder or encoder, in {', '.join(FORMATS)}; got {what}, {path}.")
    module: PlainModule = run.encoder if what == "encoder" else run.decoder
    facts = {"pvae": __version__, "name": run.name, "declaration": run.files.spec_text, "inputs": module.expected}
    disabled = logging.root.manager.disable
    logging.disable()  # torch.onnx reports the packages that it looks for
    try:
        with warnings.catch_warnings(action="ignore"):
            content = FORMATS[path.suffix](module, {**facts, "shape": json.dumps(run.shape)})
    except Exception as error:
        while isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, PvaeError):
            raise error from None
        raise DeclarationError(f"{path}: expected a {what} that the format can hold; got {brief(error)}.") from error
    finally:
        logging.disable(disabled)
    write_atomic(path, content)
    return path
