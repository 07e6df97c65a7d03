"""What shared memory each CUDA kernel asks for, from its launches: they are made on the host, where none runs.

Needs an installed longvq_layers, whose operators the kernels are called through.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

OPERATORS = ("vq_assign", "vq_attention", "vq_attention_backward", "ssm_scan", "ssm_scan_backward")


@dataclass(frozen=True)
class Launch:
    op: str
    case: tuple  # whether in three parts; columns of keys, and of values; of the scan groups of 16 modes
    kernel: str
    bytes: int


def define_on_host(path: str) -> SimpleNamespace:
    """The operators of a library from `cuda_library.on_host()`, and `close()`, which takes them away again."""
    import torch

    import longvq_layers  # noqa: F401  defines their schemas

    torch.ops.load_library(path)
    library = torch.library.Library("longvq_on_host", "DEF")
    for name in OPERATORS:
        library.define(str(getattr(torch.ops.longvq, name).default._schema).partition("::")[2])
    return SimpleNamespace(ops=torch.ops.longvq_on_host, close=library._destroy)


def launches(ops, path: str) -> list[Launch]:
    """Every launch of calls that take every kernel; `ops` are those of the library at `path`."""
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


def most_of_kernels(path: str) -> dict[str, int]:
    """The most that each kernel asks for, in bytes, by its readable name."""
    defined = define_on_host(path)
    most: dict[str, int] = {}
    for launch in launches(defined.ops, path):
        most[launch.kernel] = max(launch.bytes, most.get(launch.kernel, 0))
    defined.close()
    return most


def readable(mangled: list[str], types: bool = False) -> list[str]:
    """Kernels by name and template arguments, from their symbols, or from the types that the host names them by."""
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


def _calls(ops) -> Iterator[tuple]:
    """(operator, case, call) with the least tensors that take every kernel; of one element where that is enough."""
    import torch

    from longvq_layers.ops._attention_inputs import AttentionInputs
    from longvq_layers.ops._attention_options import Activation, AttentionOptions, KeyGrad, LocalKeys

    def empty(*sizes, dtype=torch.float32):
        return torch.empty(sizes, dtype=dtype)

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, columns in itertools.product(dtypes, (64, 128, 256)):
        k, codebook = empty(1, 1, 1, columns, dtype=dtype), empty(1, 1, columns)
        yield "vq_assign", (dtype != torch.bfloat16, columns), lambda k=k, codebook=codebook: ops.vq_assign(k, codebook)
    length = 4096  # in segments
    for dtype, columns, values in itertools.product(dtypes, (64, 128), (64, 128)):
        q, v = empty(1, 1, length, columns, dtype=dtype), empty(1, 1, length, values, dtype=dtype)
        codebook, codes = empty(1, 1, columns), torch.zeros(1, 1, length, dtype=torch.int64)
        for causal, window, activation in [
            (True, 1, Activation.SOFTMAX),
            (False, 1, Activation.LAPLACE),
            (False, 0, Activation.SOFTMAX),
        ]:
            if dtype == torch.float16 and activation == Activation.LAPLACE:
                continue
            options = AttentionOptions(1.0, causal, window, activation, LocalKeys.EXACT, KeyGrad.CLUSTER)

            def attend(tensors=(q, q, v, codebook, codes), v=v, options=options):
                args = (*AttentionInputs(*tensors, None, None, None), *options)
                out, normalizers = ops.vq_attention(*args)
                ops.vq_attention_backward(v, out, normalizers, *args)

            yield "vq_attention", (dtype == torch.float32, columns, values), attend
    for dtype, modes in itertools.product(dtypes, (16, 32)):
        u, decay = empty(1, 5 * length, 1, dtype=dtype), empty(1, modes)

        def scan(u=u, decay=decay, modes=modes):
            args = (u, decay, decay, None, None, None, None, False)
            y, _ = ops.ssm_scan(*args)
            ops.ssm_scan_backward(y, empty(1, 1, modes), *args, True, True)

        yield "ssm_scan", (dtype != torch.bfloat16, modes // 16), scan
