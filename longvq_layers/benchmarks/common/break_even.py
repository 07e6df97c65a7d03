"""The length from which a linear-time method is faster than a quadratic one."""

import math
from collections.abc import Sequence


def faster_from(lengths: Sequence[int], speed_ups: Sequence[float]) -> int | None:
    """The length from which every longer sequence is faster, interpolated between measured lengths; None: never."""
    slower = [index for index, speed_up in enumerate(speed_ups) if speed_up < 1]
    if not slower:
        return lengths[0]
    last = slower[-1]
    if last == len(lengths) - 1:
        return None
    # straight line in log length and log speed-up
    before, after = math.log(speed_ups[last]), math.log(speed_ups[last + 1])
    share = -before / (after - before)
    return round(lengths[last] * (lengths[last + 1] / lengths[last]) ** share)
