"""Check the options of tasks that a Python program gives to the public functions."""

from collections.abc import Mapping
from typing import Any, get_args

from finetune.api_arguments import require_choice, require_count, require_flag, require_list, require_path
from finetune.errors import ArgumentError, describe_unknown_name
from finetune.evaluation.tasks.task_forms import Protocol
from finetune.evaluation.tasks.task_settings import TaskSettings

_DEFAULTS: Mapping[str, Any] = {
    "protocol": "harness",
    "limit": None,
    "data": None,
    "exemplars": None,
    "batch_size": None,
    "chat": False,
    "unsafe_code": False,
}


def read_task_settings(function: str, tasks: object, options: object) -> TaskSettings:
    """Return the settings of tasks; `options` go by their names, and those that are absent have their defaults.

    Raises:
        ArgumentError: an option is unknown, or has a wrong type.
    """
    names = require_list(f"{function}: tasks", tasks, "a list of tasks")
    if not isinstance(options, Mapping):
        raise ArgumentError(
            f"{function}: task_options: must be options by their names, such as {{'limit': 100}}; found {options!r}"
        )
    for name in options:
        if name not in _DEFAULTS:
            raise ArgumentError(f"{function}: task_options: {name!r} is {describe_unknown_name(str(name), _DEFAULTS)}")
    given = {**_DEFAULTS, **options}
    limit, data, exemplars, batch = (given[name] for name in ("limit", "data", "exemplars", "batch_size"))
    require_choice(f"{function}: protocol", given["protocol"], get_args(Protocol))
    return TaskSettings(
        names,
        given["protocol"],
        None if limit is None else require_count(f"{function}: limit", limit),
        None if data is None else require_path(f"{function}: data", data),
        None if exemplars is None else require_path(f"{function}: exemplars", exemplars),
        None if batch is None else require_count(f"{function}: batch_size", batch),
        require_flag(f"{function}: chat", given["chat"]),
        require_flag(f"{function}: unsafe_code", given["unsafe_code"]),
    )
