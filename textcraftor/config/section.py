"""The base class of a configuration's sections, and the types that several sections share."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self, get_args

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

    def at(self, root: Path) -> Self:
        """A copy for loading files: each NamedFile that exists in the workspace becomes its path below `root`.

        What is saved or compared keeps the names as written, so that a workspace can be moved.
        """
        fields = type(self).model_fields
        marked = {name: FILE in field.metadata or _is_marked(field.annotation) for name, field in fields.items()}
        return self.model_copy(update={name: _at(getattr(self, name), root, marked[name]) for name in fields})

    def own_files(self) -> dict[str, str]:
        """Field -> name as written, of every NamedFile of this section itself that is set."""
        return {str(location[0]): path for location, path in named_files(self) if len(location) == 1}


def named_files(section: Section) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Location and value of every NamedFile that is set in a section and the sections within it."""
    for name, field in type(section).model_fields.items():
        marked = FILE in field.metadata or _is_marked(field.annotation)
        yield from _named_in(getattr(section, name), (name,), marked)


def locate(path: str, root: Path) -> str:
    """Where a NamedFile is: below `root` when it exists there; else as written, to be loaded as a hub id.

    The current folder does not matter: for a name that exists only there, the path below `root` is returned.
    """
    prefix = "local-dir:" if path.startswith("local-dir:") else ""  # open_clip's own notation for a folder
    written = Path(path.removeprefix(prefix))
    inside = root / written
    return f"{prefix}{inside}" if inside.exists() or written.exists() else path


def _at(value: Any, root: Path, marked: bool) -> Any:
    if isinstance(value, Section):
        return value.at(root)
    if isinstance(value, Mapping):
        return {key: _at(item, root, marked) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_at(item, root, marked) for item in value)
    return locate(value, root) if marked and value else value


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
