"""Reader of TOML files with a size limit, and parser of overrides such as `train.epochs=20`."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.errors import DeclarationError, misdeclared, near
from pvae.util.files import raising

SIZE_CAP = 1 << 20


def parse(text: str, origin: str) -> dict[str, Any]:
    """Return a TOML document as nested dicts; raises DeclarationError with a message that starts with `origin`."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise DeclarationError(f"{origin}: expected at most some hundred nested levels; got more.") from None
    except ValueError as error:  # includes TOMLDecodeError and integers beyond Python's digit limit
        raise DeclarationError(f"{origin}: expected valid TOML; got {error}.") from None


def read(path: Path) -> dict[str, Any]:
    """Return a TOML file (UTF-8, at most 1 MiB) as nested dicts; raises DeclarationError."""
    with raising(DeclarationError, f"{path}: expected a readable TOML file"), path.open("rb") as file:
        raw = file.read(SIZE_CAP + 1)
    misdeclared(len(raw) > SIZE_CAP, f"{path}: expected at most 1 MiB of TOML; got more.")
    misdeclared(raw.startswith(b"\xef\xbb\xbf"), "util.toml.mark", path=path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} = {raw[error.start]:#04x}"
        raise DeclarationError(f"{path}: expected UTF-8 text; got {byte}.") from None
    return parse(text.replace("\r\n", "\n"), str(path))


Override = tuple[tuple[str, ...], Any]
"""Path of a value, and the value."""


def parse_overrides(texts: Sequence[str]) -> list[Override]:
    """Return key path and value of every override `train.epochs=20`; a value that is not TOML is a string.

    Raises one DeclarationError that lists every malformed override.
    """
    parsed, problems = list[Override](), list[str]()
    for text in texts:
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            problems.append(f"{text!r}: expected an override like train.epochs=20; got no key or no '='.")
            continue
        try:
            parsed.append((path, parse(f"value = {value}", text)["value"]))
        except (DeclarationError, KeyError):
            parsed.append((path, value.strip()))
    misdeclared(problems, problems)
    return parsed


def find(name_or_file: str, folder: Path, wanted: str, file: str) -> Path:
    """Return the path of a TOML file, given by its name (without suffix) in `folder` or by its path.

    Raises:
        DeclarationError: there is no such name or file; the message suggests similar names.
    """
    if name_or_file in (known := sorted(path.stem for path in folder.glob("*.toml"))):
        return folder / f"{name_or_file}.toml"
    if (path := Path(name_or_file)).is_file():
        return path
    expected = f"expected {wanted} ({', '.join(known)}) or {file}"
    raise DeclarationError(f"{name_or_file}: {expected}; got neither{near(name_or_file, known)}.")


def flat(table: dict[str, Any], prefix: str = "", stop: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return nested dicts, but those with a key of `stop`, flattened to one dict with dotted keys: `train.epochs`."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        nested = isinstance(value, dict) and not stop & value.keys()
        out |= flat(value, f"{prefix}{key}.", stop) if nested else {f"{prefix}{key}": value}
    return out
