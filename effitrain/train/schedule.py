"""Learning rate as a pure function of the step."""

import math

FLOOR = 0.1  # cosine ends at a tenth of the peak


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: float) -> float:
    """The rate of step ``step`` (from 0) of ``steps``.

    Args:
        step: steps already taken.
        steps: length of the run.
        peak: highest rate.
        schedule: ``cosine`` (to a tenth of the peak), ``linear`` (to zero) or ``constant``.
        warmup: share of the run in which the rate rises linearly; the first step already trains.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if schedule == "cosine":
        return peak * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
    return peak * (1 - done) if schedule == "linear" else peak
