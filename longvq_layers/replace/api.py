"""Replace the attention of a model, and restore it."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from longvq_layers.replace import rotary_policy as positions
from longvq_layers.replace import select as choosing
from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.adapters.huggingface import adapter as huggingface
from longvq_layers.replace.calibration import code_budget as budget
from longvq_layers.replace.install import Replacement, find_sites, install, undo, undo_on_error
from longvq_layers.replace.report import ReplacementReport, layer_report
from longvq_layers.replace.slot import recorder as calibrating
from longvq_layers.replace.slot.clamped_rotary import ClampedRotary
from longvq_layers.replace.slot.swapped import SwappedAttention

_FEW_KEYS = 10  # for each code; fewer, and the codes fit the calibration data better than what comes later
_DENSE_MASKS = "the model keeps making its dense L x L masks, which every call verifies: their memory is quadratic"


def replace_attention(
    model: nn.Module,
    *,
    num_codes: int = 256,
    window: int = 64,
    local_keys: str = "exact",
    far_positions: str = "auto",
    trained_length: int | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable | None = None,
    strict: bool = True,
    dry_run: bool = False,
    backend: str = "auto",
    variance_correction: bool = True,
    balance_codes: bool = False,
) -> ReplacementReport:
    """Swap the attention of a trained model, in place, for attention over quantised keys: linear in the length.

    Works on this instance only: Hugging Face transformers 5 models that use its attention interface, and
    `torch.nn.MultiheadAttention` wherever it sits. Projections, parameter names, dtype, device, mode and hooks stay.
    Causality and padding come from the model. If anything raises, the model is as it was. In bidirectional attention a
    code stands for the mean of the sequence's own keys that chose it; in causal attention, where that would tell of the
    future, for what it was fitted to.

    Args:
        model: the model, or any part of it.
        num_codes: S, codes per key-value head, default 256.
        window: W, positions attended key by key, default 64; 0 = none.
        local_keys: "exact" (default) or "quantized" keys inside the window.
        far_positions: of rotary models, what pairs outside the window know of their distance. "rectified": the relative
            position is clamped to the window, and codes stand for keys without positions, so that lengths beyond
            training become usable; causal attention with exact local keys only. "rotated": codes stand for keys as they
            arrive. "auto" (default): "rectified" where that is possible; the report says which, and why.
        trained_length: of rectified models, the longest sequence of their training, in tokens: in longer ones the keys
            outside the window count together as much as they do there. Default the config's max_position_embeddings.
        filter_fn: `filter_fn(module, name) -> bool` chooses among the attention modules; default all. A later call can
            choose others, with other options; transformers' masks then stay dense.
        calibration: model inputs (each a tensor, a tuple of positional or a dict of keyword arguments) that the
            codebooks are fitted to; run twice, in eval mode. May be None only if the model is in training mode:
            codebooks then start from the first training batch.
        strict: True (default) raises if a chosen module can't be replaced; False skips it and reports why.
        dry_run: True only reports what would be done; calibration isn't run.
        backend: "auto" (default), "torch", "native" or "reference", see `ops.vq_attention`.
        variance_correction: True (default) lets a code account for the spread of the keys it stands for, as far as that
            helps each head on the calibration data; closer to the original at the price of one more key dimension.

        balance_codes: True gives layers whose output loses most more codes, and others fewer, num_codes on average over
            all heads; needs calibration, which then takes about twice as long. Default False.

    Returns:
        A report; `print(report)` shows a table, `report.restore()` puts the original attention back.

    Raises:
        TypeError: model, calibration or an option of the wrong type.
        ValueError: nothing to replace, a chosen module is replaced already, an option out of range, calibration
            missing, empty or not finite.
        NotImplementedError: a module that can't be replaced, or not in the way asked for (strict), each with its
            reason.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 100, 32)
        >>> report = replace_attention(layer, num_codes=16, window=8, calibration=[x])
        >>> layer(x).shape
        torch.Size([2, 100, 32])
        >>> report.restore()

    Source: LongVQ (arXiv 2404.11163); rectified positions after ReRoPE (kexue.fm/archives/9708); query-weighted k-means
    and exact local keys are this library's.
    """
    flags = {"strict": strict, "dry_run": dry_run, "variance_correction": variance_correction}
    flags["balance_codes"] = balance_codes
    num_codes, window = choosing.as_int("num_codes", num_codes, least=1), choosing.as_int("window", window, least=0)
    if trained_length is not None:
        trained_length = choosing.as_int("trained_length", trained_length, least=1)
        if trained_length <= window:
            raise ValueError(
                f"replace_attention: trained_length: got {trained_length} with window={window}, expected more: in "
                "training some keys were outside the window"
            )
    choosing.check_options(model, local_keys, far_positions, filter_fn, backend, flags)
    if not dry_run:
        choosing.check_has_values("replace_attention", model)
    sites = find_sites(model)
    positions.plan(model, sites, window, local_keys, far_positions, trained_length)
    chosen, skipped = choosing.choose_sites(model, sites, filter_fn, strict)
    if calibration is None and balance_codes:
        raise ValueError(
            "replace_attention: balance_codes: got True without calibration, which shows what a layer loses"
        )
    if calibration is None and not dry_run:
        choosing.check_modes(chosen)
    if calibration is not None:
        calibrating.check_iterable(calibration)
    batches = None if calibration is None or dry_run else calibrating.as_batches(calibration)

    options = {"num_codes": num_codes, "window": window, "local_keys": local_keys, "backend": backend}
    choosing.check_backend(chosen, backend)
    correction = {"variance_correction": variance_correction}
    errors: dict[str, tuple[float, float]] = {}
    keys, replacement = 0, None
    if dry_run:
        for site in chosen:
            if calibration is None and not site.module.training:
                site.notes.append("needs calibration= (the model is in eval mode)")
    else:
        if batches is None:
            seams = [_seam(site, site.sizes, site.rotary, {**options, **correction}) for site in chosen]
        else:
            all_options = {**options, **correction, "balance_codes": balance_codes}
            chosen, seams, errors, keys = _calibrate_what_can_be(model, chosen, skipped, batches, all_options, strict)
            for site in chosen:
                site.notes += _few_keys(keys, num_codes)
        for site, seam in zip(chosen, seams, strict=True):
            seam.train(site.module.training)
        replacement = Replacement(_settle(model, chosen, seams, batches))
        replacement.stand_in(model)
    positions.remark(chosen)
    layers = [layer_report(site, options, errors.get(site.name), skipped.get(site.name)) for site in sites]
    return ReplacementReport(
        layers,
        dry_run=dry_run,
        calibration_keys=keys,
        model=None if dry_run else model,
        replacement=replacement,
    )


def _seam(site: Site, sizes: tuple[int, int, int], rotary: ClampedRotary | None, options: dict) -> SwappedAttention:
    device, dtype = choosing.device_and_dtype(site)
    # Also in a caller's inference mode these are ordinary tensors, that can be trained later.
    with (
        torch.inference_mode(False),
        torch.random.fork_rng(devices=[]),
    ):  # a new codebook draws random codes; the caller's generator stays as it is
        positions_of = {"rotary": copy.deepcopy(rotary), "trained_length": site.trained_length}
        return SwappedAttention(*sizes, dtype=dtype, **positions_of, **options).to(device)


def _calibrate_what_can_be(
    model: nn.Module, sites: list[Site], skipped: dict[str, str], batches, options, strict: bool
):
    # Some modules show only in a call that they can't be replaced; not strict, calibration starts again without them.
    while sites:
        try:
            return sites, *_calibrate(model, sites, batches, options)
        except calibrating.CallRefused as error:
            why = f"in calibration, {error}"
            if strict:
                raise choosing.cannot_replace({error.site or "(the model itself)": why}) from error
            skipped[error.site] = why
            sites = [site for site in sites if site.name != error.site]
    raise choosing.nothing_left(model, skipped)


def _calibrate(model: nn.Module, sites: list[Site], batches: list, options: dict):
    # The original attention drives the model in all passes; the first collects, the others measure.
    options = dict(options)
    balance = options.pop("balance_codes")
    recorders = [
        calibrating.Recorder(
            site.adapter.original_function(site.module),
            site.name,
            rotary=site.rotary,
            may_stay_rotated=site.may_stay_rotated,
            window=options["window"] if options["local_keys"] == "exact" else 0,
        )
        for site in sites
    ]
    records: list = []
    try:
        install(model, sites, recorders, records, masks=False)
        calibrating.run(model, batches, recorders)
        seen = [recorder.keys is not None and recorder.keys.shape[1] > 0 for recorder in recorders]
        if not all(seen):
            names = [site.name for site, ok in zip(sites, seen, strict=True) if not ok]
            raise ValueError(
                f"replace_attention: calibration: no key reached {choosing.shorten(names)}; pass inputs with real "
                "tokens that use these modules, or leave them out with filter_fn="
            )
        keys = min(recorder.keys.shape[1] for recorder in recorders)
        for site, recorder in zip(sites, recorders, strict=True):
            site.rotary, site.why_rotated = recorder.rotary, recorder.why_rotated or site.why_rotated
            site.has_rotary &= recorder.has_positions
            if site.adapter is huggingface and recorder.causal:  # its masks decide, whatever the module says
                site.causal = "per call" if len(recorder.causal) > 1 else "yes" if True in recorder.causal else "no"
        seams = _fitted(sites, recorders, [options["num_codes"]] * len(sites), options)
        calibrating.run(model, batches, recorders)
        if balance:
            seams = _fitted(sites, recorders, _balanced(recorders, options["num_codes"]), options)
            calibrating.run(model, batches, recorders)
        for recorder in recorders:
            recorder.choose_gains()
    finally:
        undo(records)
    return seams, {site.name: rec.errors() for site, rec in zip(sites, recorders, strict=True)}, keys


def _few_keys(keys: int, num_codes: int) -> list[str]:
    enough = min(_FEW_KEYS * num_codes, calibrating.KEYS_PER_HEAD)  # no more are kept
    if keys >= enough:
        return []
    return [
        f"{num_codes} codes were fitted to {keys:,} keys per head: these errors say little about other inputs; "
        f"calibrate on at least {enough:,}"
    ]


def _fitted(sites: list[Site], recorders: list, codes: list[int], options: dict) -> list[SwappedAttention]:
    seams = []
    for site, recorder, site.num_codes in zip(sites, recorders, codes, strict=True):
        seams.append(_seam(site, recorder.sizes, recorder.rotary, {**options, "num_codes": site.num_codes}))
        calibrating.fit(recorder, seams[-1])
    return seams


def _balanced(recorders: list, num_codes: int) -> list[int]:
    generator = torch.Generator().manual_seed(calibrating.SEED)
    falls = [
        budget.falls_with_codes(recorder.candidate[0].in_metric(recorder.keys), num_codes, generator)
        for recorder in recorders
    ]
    errors = [recorder.errors()[1] ** 2 for recorder in recorders]
    return budget.share_out(errors, falls, [recorder.sizes[1] for recorder in recorders], num_codes)


def _settle(model: nn.Module, sites: list[Site], seams: list, batches: list | None) -> list:
    # Install for good, and with calibration try it: on an error nothing stays. Where transformers' mask is more than
    # causal and padding, ours can't be used; the model then keeps making its dense masks, and each call verifies them.
    ours = {site.module for site in sites}
    for masks in (True, False):
        for seam in seams:
            seam.linear_masks = masks
        with undo_on_error() as records:
            install(model, sites, seams, records, masks=masks)
            try:
                calibrating.run(model, (batches or [])[:1])
                break
            except NotImplementedError:
                if not masks:
                    raise
                undo(records)
    earlier = any(huggingface.is_replaced(module) for module in model.modules() if module not in ours)
    if not masks or earlier:
        for site in sites:
            if site.adapter is huggingface:
                site.notes.append(_DENSE_MASKS)
    return records
