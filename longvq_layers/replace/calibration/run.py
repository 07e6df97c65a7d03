"""Runs the original model over the calibration inputs, and makes a fitted slot for each planned module."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from longvq_layers.replace.adapters.base import Record
from longvq_layers.replace.calibration import code_budget
from longvq_layers.replace.calibration import recorder as recording
from longvq_layers.replace.calibration.recorder import ForwardRefused, Recorder
from longvq_layers.replace.install import install, make_slot, undo
from longvq_layers.replace.model_inputs import ModelInputs, run_in_eval
from longvq_layers.replace.plan import SwapPlan
from longvq_layers.replace.select import cannot_replace, nothing_left, shorten
from longvq_layers.replace.slot.swapped import SwappedAttention

_KEYS_PER_CODE = 10  # with fewer the codes fit the calibration data better than later inputs


@dataclass(frozen=True, eq=False)
class Calibrated:
    """The result of calibration.

    Attributes:
        plans: the plans that can be carried out, with the findings of calibration.
        slots: one fitted attention per plan.
        errors: name -> (share of the keys' variance that the codes miss, relative error of the output).
        keys: keys per head that the codebooks were fitted to.
        skipped: name -> reason, of all modules that keep their attention.
    """

    plans: list[SwapPlan]
    slots: list[SwappedAttention]
    errors: dict[str, tuple[float, float]]
    keys: int
    skipped: dict[str, str]


def calibrate(
    model: nn.Module,
    plans: Sequence[SwapPlan],
    batches: Sequence[ModelInputs],
    *,
    num_codes: int,
    balance_codes: bool,
    strict: bool,
    skipped: dict[str, str],
) -> Calibrated:
    """Fit one slot per plan. Leave out the modules of which only a call shows that they can't be replaced.

    Args:
        num_codes: S, on average over all heads.
        balance_codes: give more codes to the layers whose output has the largest errors.
        strict: raise for a module that can't be replaced.
        skipped: name -> reason, of the modules that were left out before; for errors.

    Raises:
        NotImplementedError: strict, and a module can't be replaced.
        ValueError: no module is left, a module got no key, or a key is not finite.
    """
    skipped = dict(skipped)
    left = list(plans)
    while left:
        try:
            return _calibrate(model, left, batches, num_codes, balance_codes, skipped)
        except ForwardRefused as error:
            why = f"in calibration, {error}"
            if strict:
                raise cannot_replace({error.site or "(the model itself)": why}) from error
            skipped[error.site] = why
            left = [plan for plan in left if plan.site.name != error.site]
    raise nothing_left(model, skipped)


def _calibrate(
    model: nn.Module,
    plans: list[SwapPlan],
    batches: Sequence[ModelInputs],
    num_codes: int,
    balance_codes: bool,
    skipped: dict[str, str],
) -> Calibrated:
    # The model uses its original attention in every pass. In the first pass the recorders collect keys. In later passes
    # they measure the fitted slots.
    recorders = [_recorder(plan) for plan in plans]

    def announce(number: int) -> None:
        for recorder in recorders:
            recorder.batch = number

    records: list[Record] = []
    try:
        install(model, [plan.site for plan in plans], recorders, records, linear_masks=False)
        run_in_eval(model, batches, announce)
        keys = _fewest_keys(plans, recorders)
        plans = [_learned(plan, recorder) for plan, recorder in zip(plans, recorders, strict=True)]
        slots = _fitted(plans, recorders)
        run_in_eval(model, batches, announce)
        if balance_codes:
            shares = _balanced(recorders, slots, num_codes)
            plans = [plan.with_num_codes(share) for plan, share in zip(plans, shares, strict=True)]
            slots = _fitted(plans, recorders)
            run_in_eval(model, batches, announce)
        errors = {}
        for plan, recorder in zip(plans, recorders, strict=True):
            measured = recorder.measured
            measured.choose_gains()
            errors[plan.site.name] = measured.key_error(), measured.output_error()
    finally:
        undo(records)
    note = _note_on_few_keys(keys, num_codes)
    return Calibrated([plan.with_notes(*note) for plan in plans], slots, errors, keys, skipped)


def _recorder(plan: SwapPlan) -> Recorder:
    site, options = plan.site, plan.options
    return Recorder(
        site.adapter.original_attention(site.module),
        site.name,
        rotary=plan.rotary,
        may_stay_rotated=plan.may_stay_rotated,
        window=options.window if options.local_keys == "exact" else 0,
    )


def _fewest_keys(plans: Sequence[SwapPlan], recorders: Sequence[Recorder]) -> int:
    counts = [0 if recorder.keys is None else recorder.keys.shape[1] for recorder in recorders]
    if not all(counts):
        names = [plan.site.name for plan, count in zip(plans, counts, strict=True) if not count]
        raise ValueError(
            "replace_attention: calibration must reach every module with real tokens, got inputs of which no key "
            f"reached {shorten(names)}; pass inputs that use these modules, or leave them out with filter_fn="
        )
    return min(counts)


def _learned(plan: SwapPlan, recorder: Recorder) -> SwapPlan:
    causal = plan.causal
    if plan.site.adapter.model_makes_masks and recorder.causal:  # the masks decide, whatever the module says
        causal = "per call" if len(recorder.causal) > 1 else "yes" if True in recorder.causal else "no"
    return dataclasses.replace(
        plan,
        causal=causal,
        rotary=recorder.rotary,
        why_rotated=recorder.why_rotated or plan.why_rotated,
        has_rotary=plan.has_rotary and recorder.has_positions,
    )


def _fitted(plans: Sequence[SwapPlan], recorders: Sequence[Recorder]) -> list[SwappedAttention]:
    slots = []
    for plan, recorder in zip(plans, recorders, strict=True):
        slot = make_slot(plan, recorder.collected_sizes)
        recording.fit(recorder, slot)
        slots.append(slot)
    return slots


def _balanced(recorders: Sequence[Recorder], slots: Sequence[SwappedAttention], num_codes: int) -> list[int]:
    generator = torch.Generator().manual_seed(recording.SEED)
    exponents = [
        code_budget.error_exponent(slot.in_metric(recorder.collected_keys), num_codes, generator)
        for recorder, slot in zip(recorders, slots, strict=True)
    ]
    errors = [recorder.measured.output_error() ** 2 for recorder in recorders]
    return code_budget.share_out(errors, exponents, [slot.num_kv_heads for slot in slots], num_codes)


def _note_on_few_keys(keys: int, num_codes: int) -> tuple[str, ...]:
    enough = min(_KEYS_PER_CODE * num_codes, recording.KEYS_PER_HEAD)  # no more are kept
    if keys >= enough:
        return ()
    return (
        f"{num_codes} codes were fitted to {keys:,} keys per head: these errors say little about other inputs; "
        f"calibrate on at least {enough:,}",
    )
