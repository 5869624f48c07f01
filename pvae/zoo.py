"""The zoo: one declared file for every system, found by name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from pvae import toml
from pvae.errors import DeclarationError, near

FOLDER = Path(__file__).parent / "models" / "zoo"


def names() -> list[str]:
    """Names of the zoo's files, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def entries() -> list[tuple[str, str]]:
    """(name, description) of every file."""
    return [(name, str(toml.read(FOLDER / f"{name}.toml").get("description", ""))) for name in names()]


def find(name_or_file: str) -> Path:
    """The file that a zoo name or a path means.

    Raises:
        DeclarationError: neither; near names are suggested.
    """
    if name_or_file in names():
        return FOLDER / f"{name_or_file}.toml"
    path = Path(name_or_file)
    if path.is_file():
        return path
    raise DeclarationError(
        f"{name_or_file}: expected a zoo name ({', '.join(names())}) or a TOML file; "
        f"got neither{near(name_or_file, names())}."
    )
