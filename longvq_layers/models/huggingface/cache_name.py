"""The name of the cache argument: `cache` since transformers 5.24, `past_key_values` before. The models take both."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")
NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def given(caller: str, past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache under either name; ValueError if both are given."""
    if past_key_values is not None and cache is not None:
        raise ValueError(f"{caller}: give either cache or past_key_values, two names of one argument, got both")
    return past_key_values if cache is None else cache


def renamed(caller: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with the cache under the name that the installed transformers uses."""
    rest = {name: value for name, value in arguments.items() if name not in _NAMES}
    cache = given(caller, arguments.get("past_key_values"), arguments.get("cache"))
    return rest if cache is None else {**rest, NAME: cache}
