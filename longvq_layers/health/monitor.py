"""Hooks that record attention entropy, gates and gradients of a model while it trains."""

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longvq_layers import _checks as check
from longvq_layers.health import _model_parts
from longvq_layers.health._moving_average import MovingAverage, Reading
from longvq_layers.health.entropy import attention_entropy
from longvq_layers.health.gradients import GradientTable, gradient_scales
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.commitment import commitment_loss
from longvq_layers.layers.common.context import recomputing

CLOSED, OPEN = 0.05, 0.95  # an output gate outside of this range counts as saturated
SHUT = -5.0  # an attention gate with a smaller input of silu counts as saturated: less than 0.034 passes

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Monitor:
    """Records attention entropy, gates and gradients of a model, and changes nothing that the model computes.

    Outputs, gradients, random numbers and `state_dict` are bit-identical with and without it. Forwards are recorded in
    training and in eval mode. Forwards that activation checkpointing repeats, and forwards inside `torch.compile`, are
    not recorded: to monitor a compiled model, run the uncompiled one now and then. Copies and pickles of a monitored
    model are not monitored. Only the last reading and a moving average are kept.

    Args:
        model: any module; attentions are found by their class, gates by their attribute in a block.
        every: record every n-th call of each module, starting with the first, and every n-th `after_backward`;
            default 1. Each entropy assigns the keys of up to 8 sequences once more.
        queries: query rows per call for the entropy, default 64.

    Raises:
        TypeError, ValueError: `model` is not a module, or `every` or `queries` is not an int of at least 1.

    Example:
        >>> import longvq_layers
        >>> model = longvq_layers.LongVQBlock(16, num_codes=8, d_state=8)
        >>> with Monitor(model) as monitor:
        ...     loss = model(torch.randn(2, 40, 16)).square().mean()
        ...     loss.backward()
        ...     monitor.after_backward(loss)
        >>> 0 < monitor.entropy["attention"].average <= 1, 0 < monitor.output_gates["output_gate"].average < 1
        (True, True)
    """

    def __init__(self, model: nn.Module, *, every: int = 1, queries: int = 64) -> None:
        check.module("Monitor", "model", model)
        check.positive("Monitor", every=every, queries=queries)
        self.model, self.every, self.queries = model, every, queries
        self._entropy: dict[str, MovingAverage] = {}
        self._output_gates: dict[str, MovingAverage] = {}
        self._attention_gates: dict[str, MovingAverage] = {}
        self._commitment = MovingAverage()
        self._gradients: GradientTable | None = None
        self._backwards = 0
        self._masks: dict[int, Tensor | None] = {}  # id of a module -> mask of its current forward
        self._handles: list[RemovableHandle] = []
        self._attach()

    # ---- readings -------------------------------------------------------------------------------------------------

    @property
    def entropy(self) -> dict[str, Reading]:
        """Name of the attention -> normalised entropy per head, see `attention_entropy`."""
        return {name: running.read() for name, running in self._entropy.items()}

    @property
    def output_gates(self) -> dict[str, Reading]:
        """Name of the gate -> mean of G_o = sigmoid(·), share below 0.05, share above 0.95."""
        return {name: running.read() for name, running in self._output_gates.items()}

    @property
    def attention_gates(self) -> dict[str, Reading]:
        """Name of the gate -> mean of |G_a| = |silu(·)|, share of inputs below −5, where almost nothing passes."""
        return {name: running.read() for name, running in self._attention_gates.items()}

    @property
    def gradients(self) -> GradientTable | None:
        """The table of the last recorded `after_backward`; None before the first."""
        return self._gradients

    @property
    def commitment(self) -> Reading:
        """Commitment loss over the task's loss; empty if `after_backward` was called without a loss."""
        return self._commitment.read()

    def after_backward(self, task_loss: Tensor | float | None = None) -> None:
        """Record the gradients; call it between `backward()` and `zero_grad()`.

        Args:
            task_loss: the loss without the commitment loss, which is compared with it; default none.

        Raises:
            TypeError, ValueError: `task_loss` is not a number or a tensor with one element.
        """
        if isinstance(task_loss, Tensor):
            if task_loss.numel() != 1:
                raise ValueError(f"Monitor: task_loss must have one element, got shape {tuple(task_loss.shape)}")
        elif task_loss is not None:
            check.number("Monitor", "task_loss", task_loss)
        self._backwards += 1
        if (self._backwards - 1) % self.every:
            return
        self._gradients = gradient_scales(self.model)
        if task_loss is not None:
            task = abs(float(task_loss.detach() if isinstance(task_loss, Tensor) else task_loss))
            commitment = float(commitment_loss(self.model).detach())
            self._commitment.update(torch.tensor([commitment / task if task else math.inf]))

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Remove the hooks and keep the readings. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _attach(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, (CodebookAttention, DenseAttention)):
                self._entropy[name] = MovingAverage()
                self._hook(module.register_forward_hook, Monitor._see_attention, name)
        owners = set()
        for gate in _model_parts.gates(self.model):
            (self._output_gates if gate.is_output else self._attention_gates)[gate.name] = MovingAverage()
            see = Monitor._see_output_gate if gate.is_output else Monitor._see_attention_gate
            self._hook(gate.layer.register_forward_hook, see, gate.name, id(gate.owner), gate.columns)
            if id(gate.owner) not in owners:
                owners.add(id(gate.owner))
                self._hook(gate.owner.register_forward_pre_hook, Monitor._see_mask, "", id(gate.owner), every=1)
                forget = partial(gate.owner.register_forward_hook, always_call=True)
                self._hook(forget, Monitor._forget_mask, "", id(gate.owner), every=1)

    def _hook(
        self,
        register: Callable[..., RemovableHandle],
        see: Callable[..., None],
        name: str,
        owner: int = 0,
        columns: slice = slice(None),
        every: int | None = None,
    ) -> None:
        hook = _Hook(weakref.ref(self), see, name, owner, columns, self.every if every is None else every)
        self._handles.append(register(hook, with_kwargs=True))

    def _see_attention(
        self, hook: "_Hook", module: CodebookAttention | DenseAttention, args: Args, kwargs: Kwargs, output: Tensor
    ) -> None:
        named = {**dict(zip(("q", "k", "v", "key_padding_mask"), args, strict=False)), **kwargs}
        named.pop("v")
        entropy = attention_entropy(module, named.pop("q"), named.pop("k"), **named, queries=self.queries)
        self._entropy[hook.name].update(entropy)

    def _see_mask(self, hook: "_Hook", module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        self._masks[hook.owner] = kwargs.get("key_padding_mask", args[1] if len(args) > 1 else None)

    def _forget_mask(self, hook: "_Hook", module: nn.Module, args: Args, kwargs: Kwargs, output: object) -> None:
        self._masks.pop(hook.owner, None)

    def _see_output_gate(self, hook: "_Hook", module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> None:
        gate = output[..., hook.columns].float().sigmoid()
        shares = (gate, (gate < CLOSED).float(), (gate > OPEN).float())
        self._output_gates[hook.name].update(self._means(hook.owner, *shares))

    def _see_attention_gate(self, hook: "_Hook", module: nn.Module, args: Args, kwargs: Kwargs, output: Tensor) -> None:
        inputs = output[..., hook.columns].float()
        gate = nn.functional.silu(inputs).abs()
        self._attention_gates[hook.name].update(self._means(hook.owner, gate, (inputs < SHUT).float()))

    def _means(self, owner: int, *values: Tensor) -> Tensor:
        """(n,) means of (B, L, d) tensors over the unmasked positions; NaN if there are none."""
        mask = self._masks.get(owner)
        if isinstance(mask, Tensor) and mask.shape == values[0].shape[:-1]:
            keep = (~mask).unsqueeze(-1)
            count = keep.sum() * values[0].shape[-1]
            return torch.stack([value.masked_fill(~keep, 0).sum() / count for value in values])
        return torch.stack([value.mean() for value in values])


class _Hook:
    """Calls its monitor, if that still exists and the output has values to read; a copy of the hook does nothing."""

    def __init__(
        self, monitor: weakref.ref[Monitor], see: Callable[..., None], name: str, owner: int, columns: slice, every: int
    ) -> None:
        self.monitor, self.see, self.name, self.owner = monitor, see, name, owner
        self.columns, self.every = columns, every
        self.calls = 0

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, output: object = None) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or recomputing():
            return
        monitor = self.monitor()
        if monitor is None:
            return
        if output is not None and self.see is not Monitor._forget_mask and not _readable(output):
            return
        self.calls += 1
        if (self.calls - 1) % self.every == 0:
            with torch.no_grad():
                self.see(monitor, self, module, args, kwargs, output)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _inert, ()


def _readable(x: object) -> bool:
    # False for fake tensors of a tracer, wrappers of `torch.func` and tensors on the meta device.
    return type(x) is Tensor and not x.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _nothing(*_: object) -> None:
    """The hook of a copy."""


def _inert() -> Callable[..., None]:
    return _nothing
