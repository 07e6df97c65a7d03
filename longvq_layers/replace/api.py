"""Replace the attention of a model."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from longvq_layers import _checks as check
from longvq_layers.replace.calibration.run import calibrate
from longvq_layers.replace.install import find_sites, install_and_verify, make_slot
from longvq_layers.replace.model_inputs import ModelInputs, check_inputs, read_inputs
from longvq_layers.replace.options import NAME, check_has_values, checked_options
from longvq_layers.replace.plan import SwapPlan
from longvq_layers.replace.report import ReplacementReport, replaced_layer, skipped_layer
from longvq_layers.replace.select import check_can_start_without_calibration, select, with_backends
from longvq_layers.replace.slot.settings import SlotOptions
from longvq_layers.replace.slot.swapped import SwappedAttention

_NEEDS_CALIBRATION = "needs calibration= (the model is in eval mode)"


def replace_attention(
    model: nn.Module,
    *,
    num_codes: int = SlotOptions.num_codes,
    window: int = SlotOptions.window,
    local_keys: str = SlotOptions.local_keys,
    far_positions: str = "auto",
    trained_length: int | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    calibration: Iterable[ModelInputs] | None = None,
    strict: bool = True,
    dry_run: bool = False,
    backend: str = SlotOptions.backend,
    variance_correction: bool = SlotOptions.variance_correction,
    balance_codes: bool = False,
) -> ReplacementReport:
    """Swap the attention of a trained model, in place, for attention over quantised keys: linear in the length.

    Changes this instance only. It works on Hugging Face transformers 5 models that use its attention interface, on
    `torch.nn.MultiheadAttention` in any model, and on classes given to `register_adapter`. Projections, parameter
    names, dtype, device, mode and hooks stay. The model decides about causality and padding. If anything raises, the
    model is as it was before. In bidirectional attention, the codeword of a code is the mean of those keys of the
    sequence that have this code. In causal attention it is the calibrated codeword, because that mean would leak the
    future.

    Args:
        model: the model, or any part of it.
        num_codes: S, codes per key-value head, default 256.
        window: W, positions attended key by key, default 64; 0 = none.
        local_keys: "exact" (default) or "quantized" keys inside the window.
        far_positions: how rotary models treat pairs outside the window. "rectified": the relative position is clamped
            to the window, and codes represent keys without positions. Lengths beyond training then become usable. Only
            for causal attention with exact local keys. "rotated": codes represent the rotated keys. "auto" (default):
            "rectified" where that is possible, else "rotated"; the report says which, and why.
        trained_length: for rectified models, the longest sequence of their training, in tokens. In longer sequences the
            keys outside the window together count as much as they do at this length. Default the config's
            max_position_embeddings.
        filter_fn: `filter_fn(module, name) -> bool` chooses among the attention modules; default all. A later call can
            choose others, with other options; transformers' masks then stay dense.
        calibration: model inputs to which the codebooks are fitted; each is a tensor, a tuple of positional arguments
            or a dict of keyword arguments. The model runs them twice, in eval mode. May be None only if the model is in
            training mode; codebooks then start from the first training batch.
        strict: True (default) raises if a chosen module can't be replaced; False skips it and reports why.
        dry_run: True only reports what would be done; calibration doesn't run. Default False.
        backend: "auto" (default), "torch", "native" or "reference", see `ops.vq_attention`.
        variance_correction: True (default) lets a code account for the spread of its keys, as far as that helps each
            head on the calibration data. The result is closer to the original and costs one more key dimension.
        balance_codes: True gives more codes to the layers whose output has the largest errors, and fewer codes to the
            others. The mean over all heads is at most num_codes. Needs calibration, which then takes about twice as
            long. Default False.

    Returns:
        A report; `print(report)` shows a table, `report.restore()` puts the original attention back.

    Raises:
        TypeError: model, calibration or an option of the wrong type.
        ValueError: nothing to replace, a chosen module is replaced already, an option out of range, calibration
            missing, empty or not finite.
        NotImplementedError: with strict, a chosen module can't be replaced, or not with these options; the message
            gives each reason.

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
    check.module(NAME, "model", model)
    options = checked_options(
        num_codes=num_codes,
        window=window,
        local_keys=local_keys,
        far_positions=far_positions,
        trained_length=trained_length,
        filter_fn=filter_fn,
        strict=strict,
        dry_run=dry_run,
        backend=backend,
        variance_correction=variance_correction,
        balance_codes=balance_codes,
    )
    if not dry_run:
        check_has_values(NAME, model)
    sites = find_sites(model)
    plans, skipped = select(model, sites, options)
    _check_calibration(calibration, plans, dry_run, balance_codes)
    batches = [] if calibration is None or dry_run else read_inputs(NAME, "calibration", calibration)
    plans = with_backends(plans)

    errors: dict[str, tuple[float, float]] = {}
    keys, replacement = 0, None
    if dry_run:
        plans = [_with_dry_run_note(plan, calibration is not None) for plan in plans]
    else:
        if batches:
            calibrated = calibrate(
                model,
                plans,
                batches,
                num_codes=options.slot.num_codes,
                balance_codes=balance_codes,
                strict=strict,
                skipped=skipped,
            )
            plans, slots, skipped = calibrated.plans, calibrated.slots, calibrated.skipped
            errors, keys = calibrated.errors, calibrated.keys
        else:
            slots = _uncalibrated_slots(plans)
        for plan, slot in zip(plans, slots, strict=True):
            slot.train(plan.site.module.training)
        replacement, plans = install_and_verify(model, plans, slots, batches)
        replacement.register_on(model)
    planned = {plan.site.name: plan.with_notes(*plan.rotary_notes) for plan in plans}
    layers = [
        replaced_layer(planned[site.name], errors.get(site.name))
        if site.name in planned
        else skipped_layer(site, skipped[site.name])
        for site in sites
    ]
    return ReplacementReport(
        layers,
        dry_run=dry_run,
        calibration_keys=keys,
        model=None if dry_run else model,
        replacement=replacement,
    )


def _check_calibration(
    calibration: Iterable[ModelInputs] | None, plans: Sequence[SwapPlan], dry_run: bool, balance_codes: bool
) -> None:
    if calibration is not None:
        check_inputs(NAME, "calibration", calibration)
        return
    if balance_codes:
        raise ValueError(
            f"{NAME}: balance_codes must be False without calibration, got True; calibration shows what a layer loses"
        )
    if not dry_run:
        check_can_start_without_calibration(plans)


def _uncalibrated_slots(plans: Sequence[SwapPlan]) -> list[SwappedAttention]:
    # Without calibration every site has its sizes; this was checked.
    return [make_slot(plan, plan.site.sizes) for plan in plans if plan.site.sizes is not None]


def _with_dry_run_note(plan: SwapPlan, is_calibrated: bool) -> SwapPlan:
    return plan if is_calibrated or plan.site.module.training else plan.with_notes(_NEEDS_CALIBRATION)
