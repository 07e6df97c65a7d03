"""Attention modules of your own classes, by an adapter that says what their queries, keys and values are."""

import copyreg
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from longvq_layers.replace.adapters.base import Site, own_forward
from longvq_layers.replace.adapters.custom.checks import check_call, check_output
from longvq_layers.replace.slot.context import cloned
from longvq_layers.replace.slot.full_attention import full_attention
from longvq_layers.replace.slot.recorder import Recorder

_SEAM = "longvq"


@dataclass(frozen=True)
class _Adapter:
    forward: Callable
    sizes: Callable | None
    check: bool
    swapped: type[nn.Module]


_registered: dict[type[nn.Module], _Adapter] = {}


def register_adapter(
    cls: type[nn.Module],
    adapter: Callable,
    *,
    sizes: Callable[[nn.Module], tuple[int, int, int]] | None = None,
    check: bool = True,
) -> None:
    """Let `replace_attention` replace attention modules of class `cls`, in every model.

    Args:
        cls: the class; of its subclasses those that inherit its forward count as well.
        adapter: ``adapter(module, attend, *args, **kwargs)`` takes the place of ``module(*args, **kwargs)``. It makes
            q (B, H, L, D), k (B, Hkv, L, D) and v (B, Hkv, L, E) as the module does, calls ``attend(q, k, v,
            causal=False, key_padding_mask=None, scale=None)``, with key_padding_mask (B, L) bool, True = ignore and
            scale D ** -0.5 by default, and returns what the module would with the (B, H, L, E) it gets.
        sizes: ``sizes(module)`` is (H, Hkv, D). Only needed for models that start without calibration. Default none.
        check: True (default) compares, in calibration, what the adapter returns with attention to every key with what
            the module itself returns (the first of several), and raises ValueError if it is something else: a wrong
            mask, scale or projection would go unnoticed. For that both are called more often, once without padding and
            once with it (if the output begins with batch and length in some order, or both in one). False for a module
            that attends to less, on purpose.

    Raises:
        TypeError: cls isn't a class of modules, adapter or sizes can't be called, check isn't a bool.

    Example:
        >>> import torch
        >>> class MyAttention(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        ...     def forward(self, x):
        ...         q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...         y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        ...         return self.out(y.transpose(1, 2).flatten(2))
        >>> def adapter(module, attend, x):
        ...     q, k, v = module.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        ...     return module.out(attend(q, k, v).transpose(1, 2).flatten(2))
        >>> register_adapter(MyAttention, adapter)
        >>> from longvq_layers import replace_attention
        >>> model, x = torch.nn.Sequential(MyAttention(), MyAttention()).eval(), torch.randn(2, 100, 32)
        >>> len(replace_attention(model, num_codes=16, window=8, calibration=[x]).replaced)
        2
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_adapter: cls: got {cls!r}, expected a class of torch.nn.Module")
    for name, value in (("adapter", adapter), ("sizes", sizes)):
        if not callable(value) and not (name == "sizes" and value is None):
            raise TypeError(f"register_adapter: {name}: got {type(value).__name__}, expected a callable")
    if not isinstance(check, bool):
        raise TypeError(f"register_adapter: check: got {type(check).__name__}, expected True or False")
    _registered[cls] = _Adapter(adapter, sizes, check, _swapped_class(cls))


def find(model: nn.Module) -> list[Site]:
    """Every module of a registered class."""
    return [_site(name, module) for name, module in model.named_modules() if _class_of(module) is not None]


def is_replaced(module: nn.Module) -> bool:
    """Whether this module's attention is ours already."""
    return isinstance(module, _Swapped)


def original_function(module: nn.Module) -> None:
    """None: calibration computes the original attention from queries, keys and values."""


@dataclass
class Installed:
    """Swaps modules and remembers what it changed, by object, so that a deep copy of the model can undo it too."""

    attached: list[nn.Module] = field(default_factory=list)

    def install(self, model: nn.Module, sites: list[Site], seams: list[nn.Module], *, masks: bool) -> None:
        """Give each module its seam and the adapter's forward.

        Args:
            masks: unused, masks come with each call.
        """
        for site, seam in zip(sites, seams, strict=True):
            self.attached.append(site.module)
            site.module.longvq = seam
            site.module.__class__ = _swapped_of(type(site.module), _class_of(site.module))

    def undo(self) -> None:
        """Put everything back."""
        for module in self.attached:
            module.__class__ = type(module).original
            module._modules.pop(_SEAM, None)


class _Swapped:
    # Mixed into the class of a replaced module; `original` is the class that it was.
    original: type[nn.Module]

    def forward(self, *args, **kwargs):
        seam, cls = self._modules[_SEAM], _class_of(self)
        adapter, name = _registered[cls], f"adapter of {cls.__name__}"
        attend = _Attend(seam, name)
        if not isinstance(seam, Recorder):
            return adapter.forward(self, attend, *args, **kwargs)
        with seam.refusals():
            if not adapter.check or seam.candidate:
                return adapter.forward(self, attend, *args, **kwargs)
            kept = cloned((args, kwargs))  # as the module may change its input in place
            output = adapter.forward(self, attend, *args, **kwargs)
            padded = any(padding is not None for _, padding in attend.calls)
            if padded in seam.checked:
                return output
            seam.checked.add(padded)

            def called(forward: Callable, *first) -> object:
                args, kwargs = cloned(kept)
                return forward(self, *first, *args, **kwargs)

            check_output(
                name,
                lambda: called(self.original.forward),
                output,
                lambda: called(adapter.forward, _no_attention),
                attend.calls,
            )
            return output

    def __reduce_ex__(self, protocol: int):
        # The class is made here and has no importable name: copies and pickles name the original one.
        return _rebuilt, (self.original,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


class _Attend:
    """What an adapter calls with queries, keys and values."""

    def __init__(self, seam: nn.Module, name: str) -> None:
        self.seam, self.name = seam, name
        self.calls: list[tuple[torch.dtype, Tensor | None]] = []  # dtype of q and padding of each

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        key_padding_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        recording = isinstance(self.seam, Recorder)
        sizes = self.seam.sizes if recording else (self.seam.num_heads, self.seam.num_kv_heads, self.seam.head_dim)
        check_call(self.name, q, k, v, causal, key_padding_mask, scale, sizes)
        if not recording:
            return self.seam(q, k, v, key_padding_mask, causal=causal, scale=scale)
        self.calls.append((q.dtype, key_padding_mask))
        options = {"causal": causal, "key_padding_mask": key_padding_mask, "scale": scale}
        output = full_attention(q, k, v, **options)
        self.seam.observe(q, k, v, output, **options)
        return output


def _no_attention(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
    return v.new_zeros(*q.shape[:3], v.shape[3])


def _swapped_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"VQ{cls.__name__}", (_Swapped, cls), {"original": cls, "__doc__": cls.__doc__})


def _rebuilt(original: type[nn.Module]) -> nn.Module:
    kind = next((known for known in original.__mro__ if known in _registered), None)
    if kind is None:
        raise RuntimeError(
            f"longvq attention: {original.__name__} has no adapter in this process; call register_adapter first"
        )
    return copyreg.__newobj__(_swapped_of(original, kind))


def _swapped_of(original: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return _registered[kind].swapped if original is kind else _swapped_class(original)


def _class_of(module: nn.Module) -> type[nn.Module] | None:
    # The registered class whose forward this module has.
    own = getattr(type(module), "original", type(module)) if isinstance(module, _Swapped) else type(module)
    return next((cls for cls in own.__mro__ if cls in _registered and own.forward is cls.forward), None)


def _site(name: str, module: nn.Module) -> Site:
    adapter, kind = _registered[_class_of(module)], type(module).__name__
    return Site(
        name=name,
        module=module,
        adapter=sys.modules[__name__],
        kind=kind,
        new_kind=f"{kind}[longvq]",
        causal="per call",
        sizes=None if adapter.sizes is None else _sizes(kind, adapter.sizes(module)),
        refusal=own_forward(module),
    )


def _sizes(kind: str, sizes: object) -> tuple[int, int, int]:
    if not (isinstance(sizes, tuple | list) and len(sizes) == 3 and all(type(n) is int and n > 0 for n in sizes)):
        raise ValueError(f"register_adapter: sizes: got {sizes!r} for a {kind}, expected (H, Hkv, D), three ints")
    return tuple(sizes)
