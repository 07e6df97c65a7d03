"""Load a model whose attention was replaced when it was saved."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longvq_layers.replace import select as choosing
from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.install import Replacement, find_sites, install, undo_on_error
from longvq_layers.replace.report import ReplacementReport, layer_report
from longvq_layers.replace.slot.clamped_rotary import clamped_rotary
from longvq_layers.replace.slot.settings import settings_in
from longvq_layers.replace.slot.swapped import SwappedAttention

_EXTRA = "longvq._extra_state"
_FILES = ("model.safetensors", "pytorch_model.bin")


def load_replaced(
    model: nn.Module, path: str | Path | Mapping[str, Tensor], *, backend: str = "auto"
) -> ReplacementReport:
    """Replace the attention of a fresh model as it was in a saved one, and load all of its parameters and codes.

    Every replaced attention says in the state dict what it was made with, so nothing has to be given again. If anything
    raises, the model is as it was.

    Args:
        model: of the class that was replaced, with its original attention; its own weights don't matter.
        path: folder written by ``save_pretrained`` (safetensors or pickled, in shards too), file written by
            ``safetensors.torch.save_file`` or ``torch.save(model.state_dict(), file)``, or a state dict.
        backend: "auto" (default), "torch", "native" or "reference", see `ops.vq_attention`.

    Returns:
        A report, as of `replace_attention`; ``report.restore()`` puts the original attention back.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: no replaced attention in it, or names and shapes that don't fit the model, or a model on the meta
            device.
        NotImplementedError: an attention module that can't be replaced here.

    Example:
        >>> from longvq_layers import replace_attention
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> _ = replace_attention(layer, num_codes=16, window=8, calibration=[torch.randn(2, 100, 32)])
        >>> fresh = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> _ = load_replaced(fresh, layer.state_dict())
        >>> x = torch.randn(2, 50, 32)
        >>> torch.equal(fresh(x), layer(x))
        True
    """
    name = "load_replaced"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model: got {type(model).__name__}, expected a torch.nn.Module")
    choosing.check_has_values(name, model)
    state = path if isinstance(path, Mapping) else _read(Path(path))
    settings = {key[: -len(_EXTRA)].rstrip("."): settings_in(state[key]) for key in state if key.endswith(_EXTRA)}
    if not settings:
        raise ValueError(
            f"{name}: path: no replaced attention in it, expected the state of a model after replace_attention"
        )
    sites = find_sites(model)
    names = list(settings)
    settings = {_first_name(model, sites, name): own for name, own in settings.items()}
    chosen = _sites_of(sites, settings)
    choosing.check_backend(chosen, backend)
    seams = [_seam(model, site, settings[site.name], backend) for site in chosen]
    for site, seam in zip(chosen, seams, strict=True):
        places = [name for name in names if _first_name(model, sites, name) == site.name]
        seam.load_state_dict({k: v for name in places for k, v in _codes(state, name).items()})
        seam.train(site.module.training)
    others = {key: value for key, value in state.items() if not _is_code(key, names)}
    _check_fit(model, others)
    with undo_on_error() as records:
        install(model, chosen, seams, records, masks=all(s.linear_masks for s in seams))
    model.load_state_dict(others, strict=False)
    replacement = Replacement(records)
    replacement.stand_in(model)
    layers = []
    for site in sites:
        own = settings.get(site.name)
        options = {key: None if own is None else own[key] for key in ("num_codes", "window", "local_keys")}
        skipped = None if own is not None else "it had its original attention when it was saved"
        layers.append(layer_report(site, {**options, "backend": backend}, None, skipped))
    return ReplacementReport(layers, model=model, replacement=replacement)


def _first_name(model: nn.Module, sites: list[Site], name: str) -> str:
    # The state dict names a module at every place where it is used, `sites` at the first.
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return name
    return next((site.name for site in sites if site.module is module), name)


def _sites_of(sites: list[Site], settings: dict[str, dict]) -> list[Site]:
    missing = sorted(settings.keys() - {site.name for site in sites})
    if missing:
        raise ValueError(
            f"load_replaced: model: the saved one had a replaced attention at {choosing.shorten(missing)}, where "
            "this one has none; make it of the same class (of your own attention call register_adapter first)"
        )
    chosen = [site for site in sites if site.name in settings]
    choosing.check_not_replaced("load_replaced", chosen)
    refused = {site.name: site.refusal for site in chosen if site.refusal is not None}
    if refused:
        raise choosing.cannot_replace(refused)
    return chosen


def _seam(model: nn.Module, site: Site, settings: dict, backend: str) -> SwappedAttention:
    device, dtype = choosing.device_and_dtype(site)
    options = {key: value for key, value in settings.items() if key not in ("rotary", "linear_masks")}
    # Positions that were not taken off yet when it was saved leave the length of the training.
    if settings["rotary"] is not None or settings["trained_length"] is not None:
        found = clamped_rotary(model, site.name, site.module, settings["window"])
        if isinstance(found, str):
            raise NotImplementedError(f"load_replaced: {site.name}: saved with rectified positions, but {found}")
        found.part = settings["rotary"]
        site.has_rotary, site.rotary = True, found
    sizes = [options.pop(name) for name in ("num_heads", "num_kv_heads", "head_dim")]
    with torch.random.fork_rng(devices=[]):  # codes are drawn, before they are loaded
        seam = SwappedAttention(*sizes, **options, rotary=site.rotary, backend=backend, dtype=dtype).to(device)
    seam.linear_masks = settings["linear_masks"]
    return seam


def _prefix(name: str) -> str:
    return f"{name}.longvq." if name else "longvq."


def _codes(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = _prefix(name)
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _is_code(key: str, names: list[str]) -> bool:
    return any(key.startswith(_prefix(name)) for name in names)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    # All of the model's parameters and buffers, with the same shapes; of tied ones one is enough.
    own = model.state_dict()
    unknown = [key for key in state if key not in own]
    state, own = (
        {key: x for key, x in values.items() if isinstance(x, Tensor)} for values in (state, own)
    )  # no extras
    wrong = [key for key in state if key in own and own[key].shape != state[key].shape]
    given = {own[key].data_ptr() for key in state if key in own and own[key].numel()}
    missing = [
        key for key, value in own.items() if key not in state and value.numel() and value.data_ptr() not in given
    ]
    problems = {"unknown here": unknown, "of another shape": wrong, "missing": missing}
    said = [f"{what}: {choosing.shorten(keys)}" for what, keys in problems.items() if keys]
    if said:
        raise ValueError(f"load_replaced: path: its weights don't fit this {type(model).__name__}; {'; '.join(said)}")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"load_replaced: path: {path} does not exist")
    if path.is_file():
        return _read_file(path)
    for name in _FILES:
        if (path / name).is_file():
            return _read_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {key: value for shard in shards for key, value in _read_file(path / shard).items()}
    raise FileNotFoundError(f"load_replaced: path: {path} has no weights (none of {', '.join(_FILES)} or their shards)")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
