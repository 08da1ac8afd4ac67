"""Read the tools of a row: `tools`, or `functions` in OpenAI's older form."""

from collections.abc import Mapping
from typing import Any

from finetune.data.formats.messages import RowError, check_json, describe, is_empty, parse_json, read_list


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Read the list of tools of a row. Files often store it, or a part of it, as JSON in a text.

    Raises:
        RowError: it is no list of objects, or the row has `tools` and `functions`.
    """
    tools = _read_objects(row.get("tools"), "tools")
    functions = _read_objects(row.get("functions"), "functions")
    if tools and functions:
        raise RowError("has tools and functions, its older form; keep one of them")
    return tools or [{"type": "function", "function": function} for function in functions] or None


def _read_objects(value: object, name: str) -> list[dict[str, Any]]:
    """Return a list of objects that may each be stored as JSON; an empty list where there is nothing."""
    parsed = parse_json(value, name) if isinstance(value, str) and value.strip() else value
    if is_empty(parsed):
        return []
    listed = [_read_object(tool, name) for tool in read_list(parsed, name)]
    check_json(listed, name)
    return listed


def _read_object(value: object, name: str) -> dict[str, Any]:
    tool = parse_json(value, f"a tool of {name}") if isinstance(value, str) else value
    if not isinstance(tool, dict):
        raise RowError(f"{name} holds {describe(tool)}; expected objects")
    if isinstance(tool.get("function"), dict):
        return {**tool, "function": _parse_parameters(tool["function"], name)}
    return _parse_parameters(tool, name)


def _parse_parameters(tool: dict[str, Any], name: str) -> dict[str, Any]:
    parameters = tool.get("parameters")
    if not isinstance(parameters, str):
        return tool
    return {**tool, "parameters": parse_json(parameters, f"the parameters of a tool of {name}")}
