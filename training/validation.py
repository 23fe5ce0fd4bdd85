"""Settings against their model, with errors that say which setting is wrong and what is accepted."""

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

from genkit.registry import unknown

M = typing.TypeVar("M", bound=BaseModel)


def validate(model: type[M], values: Any, where: str) -> M:
    """``model(**values)`` with readable errors; ``where`` is the section's dotted name."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_line(model, e, where) for e in error.errors()]
        raise ValueError("\n".join(lines)) from None


def _line(model: type[BaseModel], error, where: str) -> str:
    loc, accepted, sections = _settings(model, [str(part) for part in error["loc"]])
    key = ".".join(filter(None, [where, *loc]))
    tag, kinds = _kinds_of(sections)
    if error["type"] == "union_tag_not_found" and kinds:
        return f"{key}={error['input']!r}: {tag} is missing; accepted are {', '.join(kinds)}"
    if error["type"] == "union_tag_invalid" and kinds:
        return unknown(f"{key}.{tag}", error["ctx"]["tag"], kinds)
    if error["type"] in ("model_type", "model_attributes_type") and sections:
        choices, how = (kinds, f"as {key}.{tag}=NAME") if kinds else (sections[0].model_fields, "a mapping")
        return f"{key}={error['input']!r}: expected settings, {how}; accepted are {', '.join(choices)}"
    if error["type"] == "extra_forbidden":
        section = ".".join(filter(None, [where, *loc[:-1]]))
        if section and not accepted:
            return f"unknown key in {section}: {loc[-1]!r}; it takes no settings"
        return unknown(f"unknown key in {section or 'the config'}: key", loc[-1], accepted)
    if error["type"] == "missing":
        return f"{key} is missing and has no default"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if loc else f"{key + ': ' if key else ''}{message}"


def _settings(model: type[BaseModel], loc: list[str]) -> tuple[list[str], list[str], list[type[BaseModel]]]:
    """Where an error is, as a recipe would say it, what the section takes that the last part stands in, and the
    sections that the last part may be.

    Pydantic puts the kind of a section that has several (``Field(discriminator=...)``) into the path.
    """
    path: list[str] = []
    models: list[type[BaseModel]] = [model]
    for i, part in enumerate(loc):
        if len(models) > 1:
            models = [m for m in models if part in _kinds(m)]
            continue
        accepted = list(models[0].model_fields) if models else []
        path.append(part)
        field = models[0].model_fields.get(part) if models else None
        models = [] if field is None else _sections(field.annotation)
        if i == len(loc) - 1:
            return path, accepted, models
    return path, [], []


def _kinds(model: type[BaseModel]) -> set[str]:
    return {str(value) for f in model.model_fields.values() for value in typing.get_args(f.annotation)}


def _kinds_of(sections: list[type[BaseModel]]) -> tuple[str, list[str]]:
    """By which setting sections of several kinds are told apart, and its values; nothing where there is one kind."""
    for name in sections[0].model_fields if len(sections) > 1 else ():
        fields = [section.model_fields.get(name) for section in sections]
        values = [typing.get_args(field.annotation) if field else () for field in fields]
        every = [v for value in values for v in value]
        if all(values) and all(isinstance(v, str) for v in every) and len(set(every)) == len(every):
            return name, every
    return "", []


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a setting may be."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _sections(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in _sections(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
