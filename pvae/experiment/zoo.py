"""The zoo: one declared file for every system, found by name. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from pvae.util import toml

FOLDER = Path(__file__).parents[1] / "models" / "zoo"


def names() -> list[str]:
    """Return the names of the zoo, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def entries() -> list[tuple[str, str]]:
    """Return the (name, description) of every file."""
    return [(name, str(toml.read(FOLDER / f"{name}.toml").get("description", ""))) for name in names()]


def find(name_or_file: str) -> Path:
    """Return the file of a zoo name or a path.

    Raises:
        DeclarationError: neither; near names are suggested.
    """
    return toml.find(name_or_file, FOLDER, "a zoo name", "a TOML file")
