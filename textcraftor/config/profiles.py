"""Reads YAML: a profile, overlaid by params.yaml, becomes a checked `Config`, or one line on what is wrong."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from textcraftor.config.run import Config
from textcraftor.config.section import Section
from textcraftor.errors import ConfigError, unknown

PROFILES = Path(__file__).parents[1] / "profiles"
OWN_PROFILES = Path("profiles")  # of the workspace
DEFAULT = "tiny"
AS_IN_PROFILE = "profile"  # the value of a key that params.yaml lists and leaves to the profile

SWITCH_HINT = " It is a fraction of the chain: 0.4 is the paper's value for sampling, 0.8 for training."


def load(params: Path | str = "params.yaml", overrides: Mapping[str, Any] | None = None, profile: str | None = None) -> Config:
    """Resolve a run: the profile, overlaid by the file `params`, overlaid by `overrides` (nested mappings).

    The folder of `params` is the workspace root, which every path in the configuration is relative to.
    profile: used instead of the profile that `params` names. The overrides in `params` belong to the profile it names, so
    another profile starts without them, and the file need not exist.
    Raises ConfigError when a file is missing or not YAML, a key is unknown or a value impossible.
    """
    return resolve(merge(written(params, profile), overrides or {}), Path(params).parent)


def written(params: Path | str, profile: str | None = None) -> dict[str, Any]:
    """What the file `params` says, or nothing but the profile where another than the file's is given: see `load`."""
    path = Path(params)
    found = _read(path) if profile is None or path.exists() else {}
    return {"profile": profile} if profile is not None and profile != found.get("profile", DEFAULT) else found


def resolve(params: Mapping[str, Any], root: Path) -> Config:
    """The run that `params` describe, as the content of a params.yaml in the workspace `root`. Raises ConfigError.

    A key whose value is `profile` is as if it were not there. It is listed because `dvc exp run -S` changes only keys that are.
    """
    profile = str(params.get("profile", DEFAULT))
    below = _read(profile_file(profile, root))
    try:
        return Config.model_validate({**merge(below, _set_keys(params)), "profile": profile})
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _set_keys(params: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not left to the profile."""
    return {
        key: _set_keys(value) if isinstance(value, Mapping) else value
        for key, value in params.items()
        if value != AS_IN_PROFILE
    }


def profile_files(root: Path) -> dict[str, Path]:
    """Name -> file of the profiles that are shipped with the library, and of the workspace's own in `profiles/`.

    Raises ConfigError when both have one of the same name.
    """
    shipped, own = ({path.stem: path for path in folder.glob("*.yaml")} for folder in (PROFILES, root / OWN_PROFILES))
    if both := sorted(shipped.keys() & own.keys()):
        raise ConfigError(f"{own[both[0]]} has the name of a shipped profile, so {both[0]!r} would mean two files. Rename it")
    return shipped | own


def profile_file(profile: str, root: Path) -> Path:
    """The file of a profile, given by its name or by its path relative to `root`, which ends in .yaml.

    Raises ConfigError when there is no such profile.
    """
    if profile.endswith((".yaml", ".yml")):
        if not (root / profile).is_file():
            raise ConfigError(f"Profile {root / profile} does not exist. Its path is relative to the folder of params.yaml")
        return root / profile
    known = profile_files(root)
    if profile not in known:
        raise ConfigError(
            f"{unknown('profile', profile, known)} A profile of your own is {OWN_PROFILES}/NAME.yaml beside params.yaml, "
            "or is named by its path: my/profile.yaml"
        )
    return known[profile]


def parsed(settings: Iterable[str]) -> dict[str, Any]:
    """Overrides for `load` from KEY=VALUE arguments, such as train.steps=3; the value is YAML.

    Raises ConfigError for an argument of another form.
    """
    overrides: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise ConfigError(f"{setting!r} is no KEY=VALUE. For instance: train.decode_size=4")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{setting!r}: the value is not YAML: {' '.join(str(error).split())}") from None
        for part in reversed(key.split(".")):
            nested = {part: nested}
        overrides = merge(overrides, nested)
    return overrides


def resolved_yaml(config: Section) -> str:
    """The configuration as YAML, with every default."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist. Run from the project's root, or name the file with --params") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must be a mapping of sections, got {type(data).__name__}")
    return data


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` overlaid by `above`: nested mappings are merged, any other value is replaced, lists too."""
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _one_line(error: ValidationError) -> str:
    """The first of pydantic's errors as one line, with its location, the value and what is allowed."""
    first, *rest = error.errors(include_url=False)
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return unknown("key", where, _keys_at(first["loc"])) + _more(rest)
    got = f" (got {first['input']!r})" if not isinstance(first["input"], dict) else ""
    hint = SWITCH_HINT if where.endswith("switch_at") else ""
    return f"{where}: {message}{got}.{hint}{_more(rest)}" if where else message + _more(rest)


def _more(rest: list[Any]) -> str:
    return f" ({len(rest)} more error{'s' if len(rest) > 1 else ''})" if rest else ""


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    """Full names of the allowed keys at the location of an unknown key; none where a part of it is no section."""
    model: Any = Config
    for part in loc[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return []
        model = field.annotation
    prefix = "".join(f"{part}." for part in loc[:-1])
    return [prefix + name for name in model.model_fields]
