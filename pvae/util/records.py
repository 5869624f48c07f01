"""Class `Record`, whose subclasses are frozen dataclasses."""

from dataclasses import dataclass, field as field, replace as replace
from typing import Any, ClassVar, dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Record:
    """Base of value types: a subclass is a frozen dataclass of its annotated fields.

    Arguments of `dataclasses.dataclass` go to the class: `class Split(Record, eq=False)`. A subclass of a subclass
    gives its own.

    Example:
        >>> class Point(Record):
        ...     x: float
        ...     y: float = 0.0
        >>> replace(Point(1.0), y=2.0)
        Point(x=1.0, y=2.0)
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, **options: bool) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, **options)(cls)
