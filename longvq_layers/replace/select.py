"""Which modules `replace_attention` replaces, and every refusal that is known before anything is touched."""

import operator

import torch
from torch import nn

from longvq_layers.ops import _dispatch as dispatch
from longvq_layers.replace.adapters.base import Site


def as_int(name: str, value: object, *, least: int) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"replace_attention: {name}: got {type(value).__name__}, expected an int")
    if number < least:
        raise ValueError(f"replace_attention: {name}: got {number}, expected at least {least}")
    return number


def check_options(model, local_keys, far_positions, filter_fn, backend, flags: dict[str, bool]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_attention: model: got {type(model).__name__}, expected a torch.nn.Module")
    if local_keys not in ("exact", "quantized"):
        raise ValueError(f"replace_attention: local_keys: got {local_keys!r}, expected 'exact' or 'quantized'")
    if far_positions not in ("auto", "rectified", "rotated"):
        raise ValueError(
            f"replace_attention: far_positions: got {far_positions!r}, expected 'auto', 'rectified' or 'rotated'"
        )
    if far_positions == "rectified" and local_keys == "quantized":
        raise ValueError(
            "replace_attention: far_positions: got 'rectified' with local_keys='quantized', expected "
            "local_keys='exact': inside the window keys keep the positions that codes don't have"
        )
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"replace_attention: backend: got {backend!r}, expected one of {dispatch.BACKENDS}")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"replace_attention: {name}: got {type(value).__name__}, expected True or False")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"replace_attention: filter_fn: got {type(filter_fn).__name__}, expected a callable or None")


def check_has_values(caller: str, model: nn.Module) -> None:
    """Raises ValueError for a model on the meta device."""
    name = next((name for name, x in model.named_parameters() if x.is_meta), None)
    if name is not None:
        raise ValueError(
            f"{caller}: model: {name} is on the meta device, expected parameters with values; load the weights first, "
            "or call this before accelerate offloads them"
        )


def check_not_replaced(caller: str, sites: list[Site]) -> None:
    names = [site.name or "(the model itself)" for site in sites if site.adapter.is_replaced(site.module)]
    if names:
        raise ValueError(
            f"{caller}: model: already replaced ({shorten(names)}); call restore_attention(model) first, "
            "or choose other modules with filter_fn="
        )


def choose_sites(model: nn.Module, sites: list[Site], filter_fn, strict: bool) -> tuple[list[Site], dict[str, str]]:
    # The sites to replace, and why each other one is skipped.
    if not sites:
        raise ValueError(
            f"replace_attention: model: nothing to replace in {type(model).__name__}: found no nn.MultiheadAttention "
            "and no transformers module that uses its attention interface"
        )
    wanted = [site for site in sites if filter_fn is None or _asked(filter_fn, site)]
    check_not_replaced("replace_attention", wanted)
    skipped = {site.name: "filter_fn returned False" for site in sites if site not in wanted}
    refused = {site.name: site.refusal for site in wanted if site.refusal is not None}
    if refused and strict:
        raise cannot_replace(refused)
    chosen = [site for site in wanted if site.refusal is None]
    if not chosen:
        raise nothing_left(model, {**skipped, **refused})
    return chosen, {**skipped, **refused}


def _asked(filter_fn, site: Site) -> bool:
    answer = filter_fn(site.module, site.name)
    if not isinstance(answer, bool):
        raise TypeError(
            f"replace_attention: filter_fn: got {type(answer).__name__} for {site.name!r}, expected it to return True "
            "or False"
        )
    return answer


def cannot_replace(refused: dict[str, str]) -> NotImplementedError:
    return NotImplementedError(
        "replace_attention: model: these modules can't be replaced; leave them out with filter_fn= or pass "
        "strict=False to skip them:\n" + "\n".join(f"  {name}: {why}" for name, why in refused.items())
    )


def nothing_left(model: nn.Module, skipped: dict[str, str]) -> ValueError:
    reasons = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
    return ValueError(f"replace_attention: model: nothing to replace in {type(model).__name__}:{reasons}")


def check_backend(chosen: list[Site], backend: str) -> None:
    # A named backend that can't serve is an error before anything is touched; ops says why.
    for site in chosen:
        device, dtype = device_and_dtype(site)
        site.backend = dispatch.choose("vq_attention", backend, device, (dtype,))


def device_and_dtype(site: Site) -> tuple[torch.device, torch.dtype]:
    parameter = next(site.module.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


def check_modes(chosen: list[Site]) -> None:
    evaluating = [site.name for site in chosen if not site.module.training]
    if evaluating:
        raise ValueError(
            f"replace_attention: calibration: got None, but {shorten(evaluating)} would run in eval mode with "
            "codebooks that hold nothing; pass calibration=[batch, ...], or call model.train() first to let them learn "
            "from the first training batch"
        )
    unknown = [site.name for site in chosen if site.sizes is None]
    if unknown:
        raise ValueError(
            f"replace_attention: calibration: got None, but the number of heads or their width can't be read from "
            f"{shorten(unknown)}; pass calibration=[batch, ...]"
        )


def shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
