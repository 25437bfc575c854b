"""What every section of a configuration is, and the types that several share."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, get_args

from pydantic import BaseModel, ConfigDict, Field

FILE: Final = "names a file or folder"  # the mark of a NamedFile

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
# A file or folder in the workspace or, by an absolute path, outside it; for some fields a hub id where no such file exists.
NamedFile = Annotated[str, FILE]


class Section(BaseModel):
    """Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def named_files(section: Section) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and value of every NamedFile that is set in a section and the sections within it."""
    for name, field in type(section).model_fields.items():
        marked = FILE in field.metadata or _is_marked(field.annotation)
        yield from _named_in(getattr(section, name), (name,), marked)


def _named_in(value: Any, location: tuple[str | int, ...], marked: bool) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, Section):
        yield from (((*location, *inner), path) for inner, path in named_files(value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_in(item, (*location, key), marked)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _named_in(item, (*location, index), marked)
    elif marked and value:
        yield location, value


def _is_marked(annotation: Any) -> bool:
    return annotation == FILE or any(
        _is_marked(part) for part in (*get_args(annotation), *getattr(annotation, "__metadata__", ()))
    )
