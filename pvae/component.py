"""Base of every declared component: a frozen, strict table with a ``kind``, registered in a family.

A *family* (``Prior``, ``Network``, ``Data`` ...) is a direct subclass of `Component`; its *members* are
the final classes below it, each with ``kind: Literal["name"] = "name"``. Defining a member registers
it. A field annotated with the family accepts any member, as an instance, as a table, or as the bare
name of a kind; the family may be extended after the fields that use it were defined (plugins).
"""

import importlib.metadata
import inspect
import json
import pkgutil
import re
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, model_validator
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, ValidationError, core_schema

from pvae.errors import DeclarationError, near

T = TypeVar("T")
S = TypeVar("S", bound=BaseModel)

Table = Annotated[T, Field(strict=False)]
"""Type of a nested table: a dict is accepted in place of an instance; the values inside are validated strictly."""

Shape = tuple[int, ...]
"""Sizes of the event dimensions of a tensor, without batch dimensions."""

Ints = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False, max_length=1000)]
"""A tuple of at most 1000 positive integers; a list (all that TOML has) is accepted."""

Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A tuple of names; a list is accepted."""

ENTRY_POINT_GROUP = "pvae.components"
IMPORTED: list[str] = []
"""Names of the modules that `load_plugins` has imported by name; the manifest of a run records them."""


class Section(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """Base of every table of a declaration: strict types, no unknown keys, no NaN, immutable."""

    @model_validator(mode="after")
    def _holdable(self) -> Self:
        """Refuse numbers that torch cannot hold: too large an integer, or a float beyond single precision."""
        if wrong := [found for name in type(self).model_fields for found in _too_large((name,), getattr(self, name))]:
            raise ValidationError.from_exception_data(type(self).__name__, wrong)
        return self


LARGEST_INTEGER = 1 << 53
LARGEST_FLOAT = 3.4e38
"""Largest number, approximately, that single precision holds."""


def problem(kind: str, loc: tuple[int | str, ...], wanted: str, found: Any, hint: str = "") -> InitErrorDetails:
    """Return an error of pydantic, which `describe` renders as `loc: expected wanted; got found` and a hint."""
    error = PydanticCustomError(kind, "{wanted}", {"wanted": wanted, "near": hint})
    return InitErrorDetails(type=error, loc=loc, input=found)


def _too_large(loc: tuple[int | str, ...], value: Any) -> Iterator[InitErrorDetails]:
    """Yield an error for each number in the value of a field that torch cannot hold."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _too_large((*loc, index), item)
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        yield problem("too_large", loc, f"an integer of at most {LARGEST_INTEGER}", value)
    elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
        yield problem("too_large", loc, f"a number that single precision holds, at most {LARGEST_FLOAT:g}", value)


class Component(Section):
    """A table with a ``kind``: a direct subclass is a family, and the classes below it are its members."""

    tag: ClassVar[str] = "kind"
    default: ClassVar[str | None] = None
    """Kind of a table that names none; None if the family has no default kind."""
    members: ClassVar[dict[str, type[Any]]]
    if TYPE_CHECKING:
        kind: str = ""

    @classmethod
    def is_family(cls) -> bool:
        """Return True for ``Prior``, ``Network`` and the like; False for their members."""
        return any(Section in base.__bases__ for base in cls.__bases__)

    @classmethod
    def __pydantic_init_subclass__(cls, **_kwargs: Any) -> None:
        if cls.is_family():
            cls.members = {}
            return
        if inspect.isabstract(cls):  # what several members share
            return
        if (field := cls.model_fields.get(cls.tag)) is None or not isinstance(field.default, str):
            raise TypeError(f'Expected `{cls.tag}: Literal["name"] = "name"` in {cls.__name__}; got none.')
        other = cls.members.setdefault(field.default, cls)
        if other is not cls and other.__qualname__ != cls.__qualname__:
            mine, theirs = (f"{kind.__module__}.{kind.__name__}" for kind in (cls, other))
            name = f"{cls.tag} = {field.default!r}"
            raise DeclarationError(f"Expected a new name for {mine}; got {name}, which belongs to {theirs}.")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not cls.is_family():
            return handler(source)
        written = core_schema.plain_serializer_function_ser_schema(cls._table, info_arg=True)
        return core_schema.no_info_plain_validator_function(cls.parse, serialization=written)

    @staticmethod
    def _table(part: "Component", info: SerializationInfo) -> dict[str, Any]:
        """Return a component as a dictionary, its kind first."""
        without: Any = {"exclude_none": bool(info.exclude_none), "exclude_unset": bool(info.exclude_unset)}
        return {part.tag: getattr(part, part.tag), **part.model_dump(**without)}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if not cls.is_family():
            return handler(schema)
        forms: list[dict[str, Any]] = [{"enum": sorted(cls.members)}, *cls.shorthand_schema()]
        for name, member in cls.members.items():
            table = handler.resolve_ref_schema(handler(member.__pydantic_core_schema__))
            if name != cls.default:
                table["required"] = sorted({*table.get("required", ()), cls.tag})
            forms.append(table)
        return {"oneOf": forms, "description": (cls.__doc__ or "").split("\n")[0]}

    @classmethod
    def shorthand_schema(cls) -> list[dict[str, Any]]:
        """Return the JSON Schemas of the forms that `shorthand` accepts."""
        return []

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return the component that ``value`` is or describes: an instance, a table with its kind, or a kind's name."""
        if isinstance(value, cls):
            return value
        table = {cls.tag: value} if isinstance(value, str) else cls.shorthand(value)
        if not isinstance(table, dict):
            raise PydanticCustomError("component", "a table with `{tag}`, or the name of a kind", {"tag": cls.tag})
        name = table.get(cls.tag, cls.default)
        if not isinstance(name, str) or name not in cls.members:
            message = f"one of {', '.join(sorted(cls.members))}"
            typo = "".join(f" (is {key!r} meant to be {cls.tag!r}?)" for key in table if near(str(key), [cls.tag]))
            close = near(name, cls.members) if isinstance(name, str) else typo
            error = problem("unknown_kind", (cls.tag,), message, name, close)
            raise ValidationError.from_exception_data(cls.__name__, [error])
        return cls.members[name].model_validate({**table, cls.tag: name})

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        """Return ``value`` as a table, if it is a short form that a family accepts, such as a number for a schedule."""
        return value


def load_members(package: str) -> None:
    """Import every module of a package and its subpackages, so that the components defined there are registered.

    Called with ``__name__`` from the ``__init__`` of such a folder, or with the name of a package.

    Example:
        >>> load_members("pvae.models.priors")
        >>> from pvae.models.priors.base import Prior
        >>> "realnvp" in Prior.members
        True
    """
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)


def load_plugins(modules: tuple[str, ...] = (), *, report: Callable[[str], None] = lambda _line: None) -> None:
    """Import installed plugins (entry points `pvae.components`) and the modules named on the command line.

    Never called with a name that came from a file.

    Raises:
        DeclarationError: a module named on the command line cannot be imported.
    """
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # a broken plugin must not take pvae down
            report(f"plugin {point.name} could not be loaded: {error}")
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            hint = f" Give its name, {name[:-3]}, without .py." if name.endswith(".py") else ""
            raise DeclarationError(f"--import {name}: expected an importable module; got {error}.{hint}") from error
        IMPORTED.append(name)


# ---------------------------------------------------------------------- problems of a declaration, in words


def from_table(kind: type[S], raw: Any, origin: str) -> S:
    """Return the validated table of class `kind` that nested dictionaries declare.

    Arguments:
        kind: class of the table.
        raw: the nested dicts, as TOML gives them.
        origin: file or call that the messages name first.

    Raises:
        DeclarationError: every problem, each as `origin: dotted.path: expected ...; got ...`.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # Wrong items, which have an error of their own, are not counted in the length of their list.
        found = [e for e in error.errors() if e["type"] != "too_short" or len(e["input"]) == e["ctx"]["actual_length"]]
        raise DeclarationError([f"{origin}: {describe(each, raw, kind)}" for each in found]) from None


def _unwrap(annotation: Any) -> Any:
    """Return the type inside `Annotated` and `Optional`."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return _unwrap(next(inner for inner in get_args(annotation) if inner is not type(None)))
    return annotation


def table_at(raw: Any, path: Sequence[Any], root: type[BaseModel]) -> tuple[Any, type[BaseModel] | None]:
    """Return the raw value at a path of a declaration, and the class that validates it; None for each if unknown."""
    value: Any = raw
    kind: Any = root
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = _unwrap(field.annotation) if field else None
        else:
            kind = _unwrap(get_args(kind)[-1]) if get_origin(kind) in (dict, tuple) else None
        value = value.get(part) if isinstance(value, dict) else None
        if isinstance(kind, type) and issubclass(kind, Component) and kind.is_family():
            name = value.get(kind.tag, kind.default) if isinstance(value, dict) else value
            kind = kind.members.get(name, kind) if isinstance(name, str) else kind
    return value, kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def describe(error: ErrorDetails, raw: Any, root: type[BaseModel]) -> str:
    """Return the text of a pydantic error: `dotted.path: expected ...; got ... (did you mean ...)`."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    path = ".".join(str(part) for part in loc) or "(the whole file)"
    if error["type"] == "extra_forbidden":
        _, kind = table_at(raw, loc[:-1], root)
        known = sorted(kind.model_fields) if kind else []
        wanted = f"one of {', '.join(known)}" if known else "no such key"
        hint = near(str(loc[-1]), known) or _elsewhere(str(loc[-1]), root)
        return f"{path}: expected {wanted}; got an unknown key{hint}."
    if error["type"] == "missing":
        return f"{path}: expected a value; got none."
    message = re.sub(r"^Value error, |^\w+ should (be|have) | after validation, not .*$", "", error["msg"])
    if "; got" in message:
        return f"{path}: expected {message}."
    context = error.get("ctx", {})
    hint = near(str(error["input"]), re.findall("'(.*?)'", str(context.get("expected", "")))) or context.get("near", "")
    return f"{path}: expected {message}; got {_short(error['input'])}{hint}."


def _elsewhere(key: str, root: type[BaseModel]) -> str:
    """Return a hint at the table to which an unknown key belongs, if it was written one or two tables too high."""
    tables = {name: type(f.default) for name, f in root.model_fields.items() if isinstance(f.default, Section)}
    for outer, kind in list(tables.items()):
        inner = kind.model_fields.items()
        tables |= {f"{outer}.{name}": type(f.default) for name, f in inner if isinstance(f.default, Section)}
    found = [f"{table}.{key}" for table, kind in tables.items() if key in kind.model_fields]
    return f" (did you mean {found[0]!r}?)" if found else ""


def _short(value: Any) -> str:
    """Return the text by which a message shows a value, at most 60 characters."""
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return type(value).__name__
    text = json.dumps(value, default=str) if not isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
