"""Which modules are replaced, and every refusal that is known before anything is touched."""

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from longvq_layers.ops import _dispatch as dispatch
from longvq_layers.replace import rotary_policy
from longvq_layers.replace.adapters.base import Site
from longvq_layers.replace.options import NAME, Filter, ReplaceOptions
from longvq_layers.replace.plan import SwapPlan, device_and_dtype


def select(model: nn.Module, sites: Sequence[Site], options: ReplaceOptions) -> tuple[list[SwapPlan], dict[str, str]]:
    """A plan for each module that is to be replaced, and name -> reason for each other module.

    Raises:
        ValueError: nothing to replace, or a chosen module is replaced already.
        TypeError: filter_fn returned no bool.
        NotImplementedError: with `strict`, a chosen module can't be replaced, or not with these options.
    """
    if not sites:
        raise ValueError(
            f"{NAME}: model must have attention of a known kind, got nothing to replace in {type(model).__name__}: "
            "found no nn.MultiheadAttention and no transformers module that uses its attention interface"
        )
    wanted = [site for site in sites if options.filter_fn is None or _is_wanted(options.filter_fn, site)]
    check_not_replaced(NAME, wanted)
    skipped = {site.name: "filter_fn returned False" for site in sites if site not in wanted}
    plans, refused = [], {}
    for site in wanted:
        found = site.refusal or rotary_policy.decide(
            model,
            SwapPlan.of(site, options.slot),
            far_positions=options.far_positions,
            trained_length=options.trained_length,
        )
        if isinstance(found, SwapPlan):
            plans.append(found)
        else:
            refused[site.name] = found
    if refused and options.strict:
        raise cannot_replace(refused)
    skipped |= refused
    if not plans:
        raise nothing_left(model, skipped)
    return plans, skipped


def _is_wanted(filter_fn: Filter, site: Site) -> bool:
    answer: object = filter_fn(site.module, site.name)
    if not isinstance(answer, bool):
        raise TypeError(f"{NAME}: filter_fn must return a bool, got {type(answer).__name__} for {site.name!r}")
    return answer


def with_backends(plans: Sequence[SwapPlan]) -> list[SwapPlan]:
    """The plans with the backend that serves each.

    Raises:
        NotImplementedError: a backend asked for by name can't serve a module; the message says why.
    """
    served = []
    for plan in plans:
        device, dtype = device_and_dtype(plan.site.module)
        backend = dispatch.choose("vq_attention", plan.options.backend, device, (dtype,))
        served.append(dataclasses.replace(plan, served_by=backend))
    return served


def check_can_start_without_calibration(plans: Sequence[SwapPlan]) -> None:
    """Raise ValueError for modules in eval mode, or of unknown sizes: only calibration can give them codes."""
    evaluating = [plan.site.name for plan in plans if not plan.site.module.training]
    if evaluating:
        raise ValueError(
            f"{NAME}: calibration must be given for a model in eval mode, got None, but {shorten(evaluating)} would "
            "run with codebooks that hold nothing; pass calibration=[batch, ...], or call model.train() first to let "
            "them learn from the first training batch"
        )
    unknown = [plan.site.name for plan in plans if plan.site.sizes is None]
    if unknown:
        raise ValueError(
            f"{NAME}: calibration must be given where the number of heads or their size can't be read, got None for "
            f"{shorten(unknown)}; pass calibration=[batch, ...]"
        )


def check_not_replaced(operation: str, sites: Sequence[Site]) -> None:
    """Raise ValueError if one of the sites is replaced already."""
    names = [site.name or "(the model itself)" for site in sites if site.adapter.is_replaced(site.module)]
    if names:
        raise ValueError(
            f"{operation}: model must have its original attention, got modules that are already replaced "
            f"({shorten(names)}); call restore_attention(model) first, or choose other modules with filter_fn="
        )


def cannot_replace(refused: Mapping[str, str]) -> NotImplementedError:
    """The error for modules that can't be replaced: name -> reason."""
    return NotImplementedError(
        f"{NAME}: model has modules that can't be replaced; leave them out with filter_fn= or pass strict=False to "
        "skip them:\n" + "\n".join(f"  {name}: {why}" for name, why in refused.items())
    )


def nothing_left(model: nn.Module, skipped: Mapping[str, str]) -> ValueError:
    """The error for a model of which every module is skipped: name -> reason."""
    reasons = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
    return ValueError(f"{NAME}: model has nothing to replace in {type(model).__name__}:{reasons}")


def shorten(names: Sequence[str]) -> str:
    """At most three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
