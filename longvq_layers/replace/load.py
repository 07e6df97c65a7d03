"""Load a model whose attention was replaced when it was saved."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longvq_layers import _checks as check
from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.install import Replacement, find_sites, install, make_slot, undo_on_error
from longvq_layers.replace.options import check_has_values
from longvq_layers.replace.plan import SwapPlan
from longvq_layers.replace.report import ReplacementReport, replaced_layer, skipped_layer
from longvq_layers.replace.select import cannot_replace, check_not_replaced, shorten, with_backends
from longvq_layers.replace.slot.attention_slot import SLOT
from longvq_layers.replace.slot.settings import EXTRA_STATE, SlotOptions, settings_in
from longvq_layers.replace.slot.swapped import SwappedAttention

_NAME = "load_replaced"  # in errors
_SETTINGS = f"{SLOT}.{EXTRA_STATE}"  # end of the names of settings in a state dict
_FILES = ("model.safetensors", "pytorch_model.bin")
_NOT_REPLACED = "it had its original attention when it was saved"


def load_replaced(
    model: nn.Module, path: str | Path | Mapping[str, Tensor], *, backend: str = "auto"
) -> ReplacementReport:
    """Replace the attention of a fresh model as in a saved model, and load the saved parameters and codes.

    The state dict holds the settings of every replaced attention, so they need not be given again. If anything raises,
    the model is as it was before.

    Args:
        model: of the class that was replaced, with its original attention; its own weights don't matter.
        path: a folder written by ``save_pretrained`` (safetensors or pickled, in shards too), a file written by
            ``safetensors.torch.save_file`` or ``torch.save(model.state_dict(), file)``, or a state dict.
        backend: "auto" (default), "torch", "native" or "reference", see `ops.vq_attention`.

    Returns:
        A report, as of `replace_attention`; ``report.restore()`` puts the original attention back.

    Raises:
        TypeError: model is no module.
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: no replaced attention in it, names and shapes that don't fit the model, or a model on the meta
            device.
        NotImplementedError: an attention module that can't be replaced here.

    Example:
        >>> import torch
        >>> from longvq_layers import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> _ = replace_attention(layer, num_codes=16, window=8, calibration=[torch.randn(2, 100, 32)])
        >>> fresh = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> _ = load_replaced(fresh, layer.state_dict())
        >>> x = torch.randn(2, 50, 32)
        >>> torch.equal(fresh(x), layer(x))
        True
    """
    check.module(_NAME, "model", model)
    check_has_values(_NAME, model)
    state = path if isinstance(path, Mapping) else _read(Path(path))
    saved = _settings_by_name(state)
    if not saved:
        raise ValueError(
            f"{_NAME}: path must hold the state of a model after replace_attention, got no replaced attention in it"
        )
    sites = find_sites(model)
    # The state dict has one name for each place where a module is used. A site has the first of these names.
    names_of: dict[str, list[str]] = {}
    for name in saved:
        names_of.setdefault(_first_name(model, sites, name), []).append(name)
    settings = {first: saved[names[-1]] for first, names in names_of.items()}
    chosen = _sites_of(sites, settings)
    plans = with_backends([_plan(model, site, settings[site.name], backend) for site in chosen])
    slots = [_slot(plan, settings[plan.site.name]) for plan in plans]
    for plan, slot in zip(plans, slots, strict=True):
        # Some formats store a tied tensor once: then only one of the names of a module has its codes.
        slot.load_state_dict({key: x for name in names_of[plan.site.name] for key, x in _codes(state, name).items()})
        slot.train(plan.site.module.training)
    others = {key: value for key, value in state.items() if not _is_code(key, list(saved))}
    _check_fit(model, others)
    with undo_on_error() as records:
        install(model, chosen, slots, records, linear_masks=all(slot.linear_masks for slot in slots))
    model.load_state_dict(others, strict=False)
    replacement = Replacement(records)
    replacement.register_on(model)
    planned = {plan.site.name: plan for plan in plans}
    layers = [
        replaced_layer(planned[site.name]) if site.name in planned else skipped_layer(site, _NOT_REPLACED)
        for site in sites
    ]
    return ReplacementReport(layers, model=model, replacement=replacement)


def _settings_by_name(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {key[: -len(_SETTINGS)].rstrip("."): settings_in(state[key]) for key in state if key.endswith(_SETTINGS)}


def _first_name(model: nn.Module, sites: Sequence[Site], name: str) -> str:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return name
    return next((site.name for site in sites if site.module is module), name)


def _sites_of(sites: Sequence[Site], settings: Mapping[str, object]) -> list[Site]:
    missing = sorted(settings.keys() - {site.name for site in sites})
    if missing:
        raise ValueError(
            f"{_NAME}: model must have attention where the saved model had replaced attention, got none at "
            f"{shorten(missing)}; make it of the same class (call register_adapter first for your own attention)"
        )
    chosen = [site for site in sites if site.name in settings]
    check_not_replaced(_NAME, chosen)
    refused = {site.name: site.refusal for site in chosen if site.refusal is not None}
    if refused:
        raise cannot_replace(refused)
    return chosen


def _plan(model: nn.Module, site: Site, settings: Mapping[str, Any], backend: str) -> SwapPlan:
    names = [field.name for field in dataclasses.fields(SlotOptions) if field.name != "backend"]
    options = SlotOptions(**{name: settings[name] for name in names}, backend=backend)
    plan = SwapPlan.of(site, options)
    # In a model that was saved before any call, the rotated columns aren't detected yet: `rotary` is None. If positions
    # are removed, trained_length shows it.
    if settings["rotary"] is None and settings["trained_length"] is None:
        return plan
    found = site.adapter.clamped_rotary(model, site, options.window)
    if isinstance(found, str):
        raise NotImplementedError(
            f"{_NAME}: {site.name} must allow rectified positions as in the saved model, got a module in which they "
            f"are impossible: {found}"
        )
    found.part = settings["rotary"]
    return dataclasses.replace(plan, has_rotary=True, rotary=found, trained_length=settings["trained_length"])


def _slot(plan: SwapPlan, settings: Mapping[str, Any]) -> SwappedAttention:
    sizes = settings["num_heads"], settings["num_kv_heads"], settings["head_dim"]
    slot = make_slot(plan, sizes)
    slot.linear_masks = settings["linear_masks"]
    return slot


def _prefix(name: str) -> str:
    return f"{name}.{SLOT}." if name else f"{SLOT}."


def _codes(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = _prefix(name)
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _is_code(key: str, names: Sequence[str]) -> bool:
    return any(key.startswith(_prefix(name)) for name in names)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """`state` holds all parameters and buffers of the model, with the same shapes.

    Of tied ones it may hold only one.
    """
    complete = model.state_dict()
    unknown = [key for key in state if key not in complete]
    given = {key: x for key, x in state.items() if isinstance(x, Tensor)}  # no extra states
    own = {key: x for key, x in complete.items() if isinstance(x, Tensor)}
    wrong = [key for key in given if key in own and own[key].shape != given[key].shape]
    places = {own[key].data_ptr() for key in given if key in own and own[key].numel()}
    missing = [
        key for key, value in own.items() if key not in given and value.numel() and value.data_ptr() not in places
    ]
    problems = {"unknown here": unknown, "of another shape": wrong, "missing": missing}
    found = [f"{what}: {shorten(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"{_NAME}: path must hold weights that fit this {type(model).__name__}, got {'; '.join(found)}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{_NAME}: path must be a file or folder, got {path}, which does not exist")
    if path.is_file():
        return _read_file(path)
    for name in _FILES:
        if (path / name).is_file():
            return _read_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in _read_file(path / shard).items()}
    raise FileNotFoundError(
        f"{_NAME}: path must be a folder with {' or '.join(_FILES)} or their shards, got {path}, which has no weights"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state
