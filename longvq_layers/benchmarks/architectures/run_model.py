"""Run a model of transformers and compare outputs: whole or in two pieces with a cache, with padding or without."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
"""Keyword arguments of a model."""

BOUND = 2e-4  # of a difference, relative to the largest value; float32 through a few layers
_SPLIT = 29  # tokens of the first piece
_CACHES = ("cache", "past_key_values")


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating tensors of the output; with a mask only the first (batch, length, …) one, at its real positions."""
    torch.manual_seed(0)  # some models draw random numbers
    with torch.no_grad():
        outputs = list(_tensors(model(**inputs)))
    mask = inputs.get("attention_mask")
    if mask is None:
        return outputs
    return [x[mask.bool()] for x in outputs if x.shape[:2] == mask.shape][:1]


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for name, value in output.items():
            if name not in _CACHES and "attentions" not in name:  # a replaced attention has no weights to return
                yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def difference(ones: list[Tensor], others: list[Tensor], bound: float = BOUND) -> float:
    """The largest relative difference if it is above the bound, else 0; infinity if the shapes differ."""
    worst = 0.0 if len(ones) == len(others) else float("inf")
    for one, other in zip(ones, others, strict=False):
        if one.shape != other.shape:
            return float("inf")
        if one.numel():
            error = float((one - other).abs().max() / (1 + other.abs().max()))
            worst = max(worst, error if error == error else float("inf"))
    return worst if worst > bound else 0.0


def ignores_padding(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the model runs on padded inputs, and its output does not depend on the tokens at padded positions."""
    try:
        before = run(model, inputs)
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        after = run(model, {**inputs, "input_ids": torch.where(mask, ids, ids.flip(-1))})
    except Exception:  # the original model refuses padding; each of 625 classes may have its own reason
        return False
    return bool(before) and all(bool(x.isfinite().all()) for x in before) and not difference(before, after)


def pieces_of(model: nn.Module, inputs: Inputs) -> list[Inputs] | None:
    """The inputs cut in two, if the original model gives the same result in pieces with its cache; else None."""
    ids = inputs.get("input_ids")
    if ids is None or set(inputs) != {"input_ids"}:
        return None
    pieces = [{"input_ids": ids[:, :_SPLIT]}, {"input_ids": ids[:, _SPLIT:]}]
    try:
        in_pieces = _run_pieces(model, pieces)
        whole = run(model, inputs)[0]
    except Exception:  # the original model has no cache or refuses it
        return None
    if in_pieces is None or whole.shape[:2] != ids.shape or difference([in_pieces], [whole[:, _SPLIT:]]):
        return None
    return pieces


def difference_in_pieces(model: nn.Module, pieces: list[Inputs]) -> float:
    """The difference between the second piece, read with the cache of the first, and the whole.

    Raises:
        NotImplementedError: the model refuses its cache.
    """
    whole = run(model, {"input_ids": torch.cat([piece["input_ids"] for piece in pieces], dim=1)})[0]
    in_pieces = _run_pieces(model, pieces)
    return float("inf") if in_pieces is None else difference([in_pieces], [whole[:, _SPLIT:]])


def _run_pieces(model: nn.Module, pieces: list[Inputs]) -> Tensor | None:
    torch.manual_seed(0)
    with torch.no_grad():
        first = model(**pieces[0], use_cache=True)
        name = next((name for name in _CACHES if first.get(name) is not None), None)
        if name is None:
            return None
        cache: dict[str, Any] = {name: first[name]}
        return next(_tensors(model(**pieces[1], **cache, use_cache=True)))


def reached_modules(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the modules that these inputs pass through."""
    names = {id(module): name for name, module in model.named_modules()}
    reached: set[str] = set()

    def note(module: nn.Module, args: object) -> None:
        if id(module) in names:
            reached.add(names[id(module)])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run(model, inputs)
    finally:
        handle.remove()
    return reached
