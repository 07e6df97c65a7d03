"""The options of the attention operators: their choices, their checks, and the text of the schema.

An option is a field of :class:`AttentionOptions`. The C++ operators read the same fields in the same order, see
``csrc/vq/attention_options.h`` and ``csrc/vq/attention_operator.h``; tests/ops/vq/test_attention_options.py compares
both.
"""

import math
import typing
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from longvq_layers import _checks as check

# Choices travel through the schema as integers: string arguments of stable-ABI operators leak memory on every call.


class Activation(IntEnum):
    """What turns scores into weights."""

    SOFTMAX = 0
    LAPLACE = 1


class LocalKeys(IntEnum):
    """The keys inside the window: their codewords, or the keys themselves."""

    QUANTIZED = 0
    EXACT = 1


class KeyGrad(IntEnum):
    """The gradient of keys outside the window: a share of the gradient of their codeword, or none."""

    CLUSTER = 0
    WINDOW = 1


def _names(choices: type[IntEnum]) -> tuple[str, ...]:
    return tuple(choice.name.lower() for choice in choices)


# The names that users pass; the index of a name is the value of the choice.
ACTIVATIONS, LOCAL_KEYS, KEY_GRADS = _names(Activation), _names(LocalKeys), _names(KeyGrad)


class AttentionOptions(NamedTuple):
    """The options of one call of ``vq_attention``, in the order of the schema."""

    scale: float  # unused with Activation.LAPLACE
    causal: bool
    window: int  # W, in positions
    activation: int  # Activation
    local_keys: int  # LocalKeys
    key_grad: int  # KeyGrad

    @property
    def uses_exact_keys(self) -> bool:
        """Whether scores inside the window come from the keys themselves. False without a window."""
        return self.local_keys == LocalKeys.EXACT and self.window > 0


def attention_options(
    op: str,
    *,
    head_dim: int,
    scale: float | None,
    causal: bool,
    window: int,
    activation: str,
    local_keys: str,
    key_grad: str,
) -> AttentionOptions:
    """The options that a user gave, checked. ``scale`` None means ``head_dim ** -0.5``."""
    check.window(op, window)
    check.one_of(op, "activation", activation, ACTIVATIONS)
    check.one_of(op, "local_keys", local_keys, LOCAL_KEYS)
    check.one_of(op, "key_grad", key_grad, KEY_GRADS)
    check.flags(op, causal=causal)
    check_scale(op, scale, activation)
    return AttentionOptions(
        head_dim**-0.5 if scale is None else float(scale),
        bool(causal),
        int(window),
        ACTIVATIONS.index(activation),
        LOCAL_KEYS.index(local_keys),
        KEY_GRADS.index(key_grad),
    )


def check_scale(op: str, scale: object, activation: str) -> None:
    """``scale`` is None or a finite number, and None with ``activation="laplace"``."""
    if scale is None:
        return
    if activation == "laplace":
        raise ValueError(
            f'{op}: scale has no effect with activation="laplace", which divides scores by the number of allowed keys; '
            f"got scale={scale!r}, leave it None"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", bool: "bool", int: "int"}


def schema_of(arguments: type) -> str:
    """The arguments of an operator's schema, from the fields of a NamedTuple."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(arguments).items())
