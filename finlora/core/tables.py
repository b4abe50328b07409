"""Tables that people edit as YAML, read into frozen records; a mistake is one line with file, entry, key and remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator, model_validator

from fastdora.plugin.keys import RecipeError, read_recipe
from finlora.core.errors import UserError, did_you_mean

Model = TypeVar("Model", bound="Record")


class Record(BaseModel):
    """One entry of a table. Its fields are the keys that there may be; one without a default must be there."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, entry: Any) -> Any:
        required = sorted(name for name, field in cls.model_fields.items() if field.is_required())
        if isinstance(entry, cls):
            return entry
        if not isinstance(entry, dict):
            keys = ", ".join(required)
            raise ValueError(f"is not a mapping of keys ({keys}); see the comment at the top of the file")
        for key in entry:
            if key not in cls.model_fields:
                hint = did_you_mean(str(key), cls.model_fields)
                raise ValueError(f"unknown key {key!r}; {hint}known are {', '.join(sorted(cls.model_fields))}")
        for key in required:
            if key not in entry:
                raise ValueError(f"the key {key!r} is missing")
        return entry


def expecting(what: str) -> WrapValidator:
    """Annotates a field: where its value is refused, whichever check refuses it, the error says `VALUE is not WHAT`."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"{value!r} is not {what}") from None

    return WrapValidator(check)


def read_table(path: Path, plural: str) -> dict[str, Any]:
    """The entries of a YAML file by name, not yet checked. `plural` names them ("tasks").

    Raises UserError where the file cannot be read, is no mapping, is empty, or has a key twice.
    """
    try:
        table = read_recipe(path)
    except RecipeError as error:
        raise UserError(f"{error}, or restore it from git") from error
    if not table:
        raise UserError(f"{path}: has no {plural}; restore it from git")
    return table


def read_entry(path: Path, name: str | None, entry: Any, record: type[Model]) -> Model:
    """One entry (the whole table without a name) as a record; UserError names the file, the entry, the key and what is
    wrong with the first one."""
    try:
        return record.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first.get("ctx", {}).get("error", first["msg"])
        place = [path, name, *first["loc"]] if name else [path, *first["loc"]]
        raise UserError(": ".join(map(str, [*place, reason]))) from error
