"""Tasks by name."""

import inspect

from longvq_layers import _checks as check
from longvq_layers.tasks.base import Task
from longvq_layers.tasks.copying import SelectiveCopying
from longvq_layers.tasks.digits import Digits
from longvq_layers.tasks.listops import ListOps, ListOpsShort
from longvq_layers.tasks.lra.images import LRAImage, LRAPathfinder
from longvq_layers.tasks.lra.text import LRAListOps, LRARetrieval, LRAText
from longvq_layers.tasks.python_source import BytesClassify, BytesLM
from longvq_layers.tasks.recall import MQAR

_TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        ListOps,
        ListOpsShort,
        MQAR,
        SelectiveCopying,
        Digits,
        BytesLM,
        BytesClassify,
        LRAListOps,
        LRAText,
        LRARetrieval,
        LRAImage,
        LRAPathfinder,
    )
}
NAMES = tuple(_TASKS)


def get(name: str, **options: object) -> Task:
    """The task of this name.

    Args:
        name: one of `NAMES`.
        options: of the task; `options("mqar")` lists them with their defaults.

    Raises:
        ValueError: an unknown name, or an option out of range.
        TypeError: an unknown option, a missing option that has no default, or an option of the wrong type.
        FileNotFoundError: the task needs data that do not exist.
        ImportError: the task needs a package that is not installed.

    Example:
        >>> get("mqar", length=64, pairs=4)
        <task mqar: label, length 64, 512 outputs>
    """
    task = _class(name)
    possible = inspect.signature(task).parameters
    listed = f"the options of {name!r} are {', '.join(possible)}"
    for option in options:
        if option not in possible:
            raise TypeError(f"tasks.get: {name!r} has no option {option!r}; {listed}")
    for option, parameter in possible.items():
        if parameter.default is parameter.empty and option not in options:
            raise TypeError(f"tasks.get: {name!r} needs the option {option!r}; {listed}")
    return task(**options)


def options(name: str) -> dict[str, object]:
    """The options of a task with their defaults; `inspect.Parameter.empty` for options without one.

    Example:
        >>> options("selective-copying")
        {'length': 256, 'memorise': 16, 'vocab': 16}
    """
    return {option: parameter.default for option, parameter in inspect.signature(_class(name)).parameters.items()}


def _class(name: str) -> type[Task]:
    check.one_of("tasks.get", "name", name, NAMES)
    return _TASKS[name]
