"""The zoo: TOML declarations of models that come with pvae, found by name; imports nothing heavy."""

from pathlib import Path

from pvae.util import toml

FOLDER = Path(__file__).parents[1] / "models" / "zoo"


def names() -> list[str]:
    """Return the sorted names of the declarations in the zoo."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def entries() -> list[tuple[str, str]]:
    """Return the name and description of every declaration in the zoo."""
    return [(name, str(toml.read(FOLDER / f"{name}.toml").get("description", ""))) for name in names()]


def find(name_or_file: str) -> Path:
    """Return the TOML file of a declaration, given its name in the zoo or its path.

    Raises:
        DeclarationError: there is no such name or file; similar names are suggested.
    """
    return toml.find(name_or_file, FOLDER, "a zoo name", "a TOML file")
