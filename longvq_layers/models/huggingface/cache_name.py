"""The name of the cache: `cache` in transformers since 5.24, `past_key_values` before. Here both names work in both."""

from dataclasses import fields

from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def given(caller: str, past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The one that was given; ValueError if both were."""
    if past_key_values is not None and cache is not None:
        raise ValueError(f"{caller}: give either cache or past_key_values, two names of one argument, got both")
    return past_key_values if cache is None else cache


def renamed(caller: str, arguments: dict) -> dict:
    """Keyword arguments under the name that this version of transformers knows."""
    rest = {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values")}
    found = given(caller, arguments.get("past_key_values"), arguments.get("cache"))
    return rest if found is None else {**rest, NAME: found}
