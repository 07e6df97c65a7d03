"""The shared memory that each CUDA kernel asks for, from launches on the host that record it instead of running.

Needs an installed longvq_layers: the kernels are called through its operators.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

OPERATORS = ("vq_assign", "vq_attention", "vq_attention_backward", "ssm_scan", "ssm_scan_backward")


@dataclass(frozen=True)
class Launch:
    op: str
    case: tuple[int, ...]  # a key of SHARED_BYTES in longvq_layers/ops/_cuda_limits.py
    kernel: str
    bytes: int


class HostOperators(NamedTuple):
    ops: Any  # torch.ops.longvq_on_host
    close: Callable[[], None]  # unregisters them


def define_on_host(path: str) -> HostOperators:
    """Registers the operators of a library from `cuda_library.on_host()`."""
    import torch

    import longvq_layers  # noqa: F401  defines their schemas

    torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # of torch
    library: Any = torch.library.Library("longvq_on_host", "DEF")  # type: ignore[no-untyped-call]  # of torch
    for name in OPERATORS:
        library.define(str(getattr(torch.ops.longvq, name).default._schema).partition("::")[2])
    return HostOperators(torch.ops.longvq_on_host, library._destroy)


def launches(ops: Any, path: str) -> list[Launch]:
    """All launches of calls that together launch every kernel; `ops` are the operators of the library at `path`."""
    library = ctypes.CDLL(path)
    library.longvq_on_host_end_plan.restype = ctypes.c_char_p
    found = []
    for op, case, call in _calls(ops):
        library.longvq_on_host_begin_plan()
        try:
            call()
        finally:
            plan = library.longvq_on_host_end_plan().decode()
        lines = [line.rpartition(" ") for line in plan.splitlines()]
        names = readable([name for name, _, _ in lines], types=True)
        found += [Launch(op, case, name, int(size)) for name, (_, _, size) in zip(names, lines, strict=True)]
    return found


def largest_of_each_kernel(path: str) -> dict[str, int]:
    """The most shared memory that each kernel asks for, in bytes, by its readable name."""
    defined = define_on_host(path)
    largest: dict[str, int] = {}
    for launch in launches(defined.ops, path):
        largest[launch.kernel] = max(launch.bytes, largest.get(launch.kernel, 0))
    defined.close()
    return largest


def readable(mangled: list[str], types: bool = False) -> list[str]:
    """Names and template arguments of kernels, from their symbols, or (`types`) from the types in the host's record."""
    filt = shutil.which("c++filt")
    if not filt or not mangled:
        return mangled
    command = [filt, "-t"] if types else [filt]
    text = subprocess.run(command, input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    return [_readable(line) for line in text.splitlines()]


def _readable(demangled: str) -> str:
    text = re.sub(r"longvq::cuda::|\(anonymous namespace\)::|\bvoid ", "", demangled)
    text = re.sub(r"\(\w+\)(\d+)", r"\1", text)  # an enumerator
    match = re.search(r"(\w+(?:<[^()]*>)?)(?:\(|>\*$|$)", text.replace("Named<&", ""))
    return match[1] if match else demangled


def _calls(ops: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[], object]]]:
    """(operator, case, call) for calls that together launch every kernel, with tensors as small as possible."""
    import torch

    from longvq_layers.ops._attention_inputs import AttentionInputs
    from longvq_layers.ops._attention_options import Activation, AttentionOptions, LocalKeys

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, columns in itertools.product(dtypes, (64, 128, 256)):
        assign = functools.partial(ops.vq_assign, empty(1, 1, 1, columns, dtype=dtype), empty(1, 1, columns))
        yield "vq_assign", (dtype != torch.bfloat16, columns), assign
    length = 4096  # enough for several segments
    for dtype, head_dim, value_dim in itertools.product(dtypes, (64, 128), (64, 128)):
        q, v = empty(1, 1, length, head_dim, dtype=dtype), empty(1, 1, length, value_dim, dtype=dtype)
        codes = torch.zeros(1, 1, length, dtype=torch.int64)
        inputs = AttentionInputs(q, q, v, empty(1, 1, head_dim), codes, None, None, None)
        for causal, window, activation in [
            (True, 1, Activation.SOFTMAX),
            (False, 1, Activation.LAPLACE),
            (False, 0, Activation.SOFTMAX),
        ]:
            if dtype == torch.float16 and activation == Activation.LAPLACE:
                continue
            options = AttentionOptions(1.0, causal, window, activation, local_keys=LocalKeys.EXACT)
            attend = functools.partial(_attend, ops, v, *inputs, *options)
            yield "vq_attention", (dtype == torch.float32, head_dim, value_dim), attend
    for dtype, modes in itertools.product(dtypes, (16, 32)):
        u, decay = empty(1, 5 * length, 1, dtype=dtype), empty(1, modes)
        scan = functools.partial(_scan, ops, empty(1, 1, modes), u, decay, decay, None, None, None, None, False)
        yield "ssm_scan", (dtype != torch.bfloat16, modes // 16), scan


def _attend(ops: Any, grad: object, *arguments: object) -> None:
    out, normalizers = ops.vq_attention(*arguments)
    ops.vq_attention_backward(grad, out, normalizers, *arguments)


def _scan(ops: Any, grad_state: object, *arguments: object) -> None:
    y, _ = ops.ssm_scan(*arguments)
    ops.ssm_scan_backward(y, grad_state, *arguments, True, True)
