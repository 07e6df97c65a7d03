"""The options of `replace_attention`, checked before anything else happens."""

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

from torch import nn

from longvq_layers import _checks as check
from longvq_layers.ops._attention_options import LOCAL_KEYS
from longvq_layers.ops._dispatch import BACKENDS
from longvq_layers.replace.rotary_policy import FAR_POSITIONS
from longvq_layers.replace.slot.settings import SlotOptions

NAME = "replace_attention"  # in errors
Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class ReplaceOptions:
    """The arguments of `replace_attention` apart from the model and the calibration inputs."""

    slot: SlotOptions
    far_positions: str
    trained_length: int | None
    filter_fn: Filter | None
    strict: bool
    dry_run: bool
    balance_codes: bool


def checked_options(
    *,
    num_codes: object,
    window: object,
    local_keys: str,
    far_positions: str,
    trained_length: object,
    filter_fn: Filter | None,
    strict: bool,
    dry_run: bool,
    backend: str,
    variance_correction: bool,
    balance_codes: bool,
) -> ReplaceOptions:
    """The options in their types.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.
    """
    codes, positions = _integer("num_codes", num_codes, 1), _integer("window", window, 0)
    length = None if trained_length is None else _integer("trained_length", trained_length, 1)
    if length is not None and length <= positions:
        raise ValueError(
            f"{NAME}: trained_length must be more than window={positions}, got {length}: in training some keys were "
            "outside the window"
        )
    check.one_of(NAME, "local_keys", local_keys, LOCAL_KEYS)
    check.one_of(NAME, "far_positions", far_positions, FAR_POSITIONS)
    if far_positions == "rectified" and local_keys == "quantized":
        raise ValueError(
            f"{NAME}: local_keys must be 'exact' with far_positions='rectified', got 'quantized': inside the window "
            "keys keep the positions that codes don't have"
        )
    check.one_of(NAME, "backend", backend, BACKENDS)
    check.flags(
        NAME,
        strict=strict,
        dry_run=dry_run,
        variance_correction=variance_correction,
        balance_codes=balance_codes,
    )
    check.function(NAME, "filter_fn", filter_fn)
    slot = SlotOptions(codes, positions, local_keys, variance_correction, backend)
    return ReplaceOptions(slot, far_positions, length, filter_fn, strict, dry_run, balance_codes)


def check_has_values(operation: str, model: nn.Module) -> None:
    """Raise ValueError for a model on the meta device."""
    name = next((name for name, x in model.named_parameters() if x.is_meta), None)
    if name is not None:
        raise ValueError(
            f"{operation}: model must have parameters with values, got {name} on the meta device; load the weights "
            "first, or call this before accelerate offloads them"
        )


def _integer(name: str, value: object, least: int) -> int:
    number = value
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):  # integers of NumPy and tensors count too
        with contextlib.suppress(TypeError):  # a tensor of floats, or of several numbers
            number = operator.index(value)
    check.integer(NAME, name, number, least)
    assert isinstance(number, int)  # for the type checker: the check raises otherwise
    return number
