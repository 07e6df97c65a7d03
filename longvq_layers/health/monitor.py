"""Hooks that record what a model's attention and gates do, and how its gradients compare, while it trains."""

import math
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.health import _parts
from longvq_layers.health._running import Reading, Running
from longvq_layers.health.entropy import attention_entropy
from longvq_layers.health.gradients import GradientTable, gradient_scales
from longvq_layers.layers.attention.codebook_attention import CodebookAttention
from longvq_layers.layers.attention.dense import DenseAttention
from longvq_layers.layers.commitment import commitment_loss
from longvq_layers.layers.common.context import recomputing

CLOSED, OPEN = 0.05, 0.95  # of an output gate, beyond which it counts as saturated
SHUT = -5.0  # input of silu below which an attention gate counts as saturated: less than 0.034 passes


class Monitor:
    """Records attention entropy, gates and gradients of a model, without changing anything it computes.

    Outputs, gradients, random numbers and `state_dict` stay as they are, bit by bit. Every forward counts, in training
    and in eval mode; forwards that activation checkpointing repeats, and those inside `torch.compile`, are not
    recorded: to look at a compiled model, run the plain one once in a while. Copies and pickles of a monitored model
    are not monitored. Only the last reading and a moving average are kept.

    Args:
        model: any module; what is in it is found by its class and its blocks' attributes.
        every: record every n-th call of each module, starting with the first, and every n-th `after_backward`;
            default 1. An entropy looks up the codes of up to 8 sequences once more.
        queries: query rows per call that the entropy is computed from, default 64.

    Raises:
        TypeError, ValueError: `model` is no module; `every` or `queries` is no int of at least 1.

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
        if not isinstance(model, nn.Module):
            raise TypeError(f"Monitor: model must be a torch.nn.Module, got {type(model).__name__}")
        check.positive("Monitor", every=every, queries=queries)
        self.model, self.every, self.queries = model, every, queries
        self._entropy: dict[str, Running] = {}
        self._output_gates: dict[str, Running] = {}
        self._attention_gates: dict[str, Running] = {}
        self._commitment = Running()
        self._gradients: GradientTable | None = None
        self._backwards = 0
        self._masks: dict[int, Tensor | None] = {}  # of the forward under way, by the id of the module
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._attach()

    # ---- readings -------------------------------------------------------------------------------------------------

    @property
    def entropy(self) -> dict[str, Reading]:
        """By the name of the attention: normalised entropy per head, see `attention_entropy`."""
        return {name: running.read() for name, running in self._entropy.items()}

    @property
    def output_gates(self) -> dict[str, Reading]:
        """By the name of the gate: mean of G_o = sigmoid(·), share below 0.05, share above 0.95."""
        return {name: running.read() for name, running in self._output_gates.items()}

    @property
    def attention_gates(self) -> dict[str, Reading]:
        """By the name of the gate: mean of |G_a| = |silu(·)|, share with an input below −5, which nothing passes."""
        return {name: running.read() for name, running in self._attention_gates.items()}

    @property
    def gradients(self) -> GradientTable | None:
        """The table of the last recorded `after_backward`, None before."""
        return self._gradients

    @property
    def commitment(self) -> Reading:
        """Commitment loss relative to the task's loss, empty if `after_backward` was given none."""
        return self._commitment.read()

    def after_backward(self, task_loss: Tensor | float | None = None) -> None:
        """Record the gradients; call it between `backward()` and `zero_grad()`.

        Args:
            task_loss: the loss without the commitment loss, to compare it with; default none.

        Raises:
            TypeError, ValueError: a loss that is no number or tensor with one element.
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
        """Take the hooks off; the readings stay. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._masks.clear()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _attach(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, (CodebookAttention, DenseAttention)):
                self._entropy[name] = Running()
                self._hook(module.register_forward_hook, Monitor._see_attention, name)
        owners = set()
        for gate in _parts.gates(self.model):
            (self._output_gates if gate.is_output else self._attention_gates)[gate.name] = Running()
            see = Monitor._see_output_gate if gate.is_output else Monitor._see_attention_gate
            self._hook(gate.layer.register_forward_hook, see, gate.name, id(gate.owner), gate.columns)
            if id(gate.owner) not in owners:
                owners.add(id(gate.owner))
                self._hook(gate.owner.register_forward_pre_hook, Monitor._see_mask, "", id(gate.owner), every=1)
                forget = partial(gate.owner.register_forward_hook, always_call=True)
                self._hook(forget, Monitor._forget_mask, "", id(gate.owner), every=1)

    def _hook(
        self,
        register: Callable,
        see: Callable,
        name: str,
        owner: int = 0,
        columns: slice = slice(None),
        every: int | None = None,
    ) -> None:
        hook = _Hook(weakref.ref(self), see, name, owner, columns, self.every if every is None else every)
        self._handles.append(register(hook, with_kwargs=True))

    def _see_attention(self, hook: "_Hook", module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        named = {**dict(zip(("q", "k", "v", "key_padding_mask"), args, strict=False)), **kwargs}
        named.pop("v")
        entropy = attention_entropy(module, named.pop("q"), named.pop("k"), **named, queries=self.queries)
        self._entropy[hook.name].update(entropy)

    def _see_mask(self, hook: "_Hook", module: nn.Module, args: tuple, kwargs: dict, output: None) -> None:
        self._masks[hook.owner] = kwargs.get("key_padding_mask", args[1] if len(args) > 1 else None)

    def _forget_mask(self, hook: "_Hook", module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self._masks.pop(hook.owner, None)

    def _see_output_gate(self, hook: "_Hook", module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        gate = output[..., hook.columns].float().sigmoid()
        shares = (gate, (gate < CLOSED).float(), (gate > OPEN).float())
        self._output_gates[hook.name].update(self._means(hook.owner, *shares))

    def _see_attention_gate(self, hook: "_Hook", module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        inputs = output[..., hook.columns].float()
        gate = nn.functional.silu(inputs).abs()
        self._attention_gates[hook.name].update(self._means(hook.owner, gate, (inputs < SHUT).float()))

    def _means(self, owner: int, *values: Tensor) -> Tensor:
        # Means over the unmasked positions of (B, L, d) tensors; NaN without any.
        mask = self._masks.get(owner)
        if isinstance(mask, Tensor) and mask.shape == values[0].shape[:-1]:
            keep = (~mask).unsqueeze(-1)
            count = keep.sum() * values[0].shape[-1]
            return torch.stack([value.masked_fill(~keep, 0).sum() / count for value in values])
        return torch.stack([value.mean() for value in values])


class _Hook:
    """Calls a monitor that is still there, and only where something can be read; does nothing in a copied model."""

    def __init__(self, monitor: weakref.ref, see: Callable, name: str, owner: int, columns: slice, every: int) -> None:
        self.monitor, self.see, self.name, self.owner = monitor, see, name, owner
        self.columns, self.every = columns, every
        self.calls = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
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

    def __deepcopy__(self, memo: dict) -> Callable:
        return _nothing

    def __reduce__(self) -> tuple:
        return _inert, ()


def _readable(x: object) -> bool:
    # Not the fake tensors of a tracer, nor the wrappers of `torch.func`, nor tensors without numbers.
    return type(x) is Tensor and not x.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _nothing(*_: object) -> None:
    """The hook of a copy."""


def _inert() -> Callable:
    return _nothing
