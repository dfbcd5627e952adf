"""A controller that finds the coefficient of a penalty for a density that is wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FIRST = math.log(1e-2)
_MOST = math.log(1e3)
_NOTICEABLE = 0.05
_DELAY = 6
_SLOW = 32.0
_FLOOR = 1e-6


@dataclass
class DensityControl:
    """Integral control of ``ln(coefficient)`` by the error in ``ln(density)``, with a proportional part.

    How fast the density of a model falls is, in a range of many decades, about proportional to the
    coefficient of a penalty, and which coefficient that takes differs between models by as many. So all is
    done in logarithms, and nothing has to be known of the model:

    1. *Search.* The penalty begins at 0.01 nats and grows exponentially until the density has fallen by 5 %.
    2. *Follow.* With the error e = ln(density) - ln(wanted density), at each update::

           ln(coefficient) += P * (e - e_before) + I * e / horizon,    I = 0.8 * P**2

    P, at most 8, is ``horizon / 32`` in short runs: from the coefficient to the density it takes about a
    dozen updates, the memory of Adam, and a loop that is faster than a few of these swings. The coefficient
    is clamped to the equivalent of ``least`` to 1e3 nats, the increments being what keeps it from winding up.

    The state are floats, and all of it follows from what was seen: a resumed run does the same.
    """

    horizon: float
    """Updates in which the wanted density is to be reached."""
    least: float = 1e-6
    """In nats, at most 0.01."""
    reference: float = 0.0
    """The penalty at the first update; a coefficient of 1 / reference is 1 nat."""
    log_share: float = _FIRST
    """ln(coefficient * reference)."""
    density: float | None = None
    """ln of the smoothed density; None before the first update."""
    natural: float = 0.0
    """The largest of it during the search: what the model has without a penalty."""
    error: float | None = None
    """In ln(density), of the last update; None while the coefficient is searched for."""

    @property
    def coefficient(self) -> float:
        """For the next update; 0 before the first was seen."""
        return math.exp(self.log_share) / self.reference if self.reference > 0 else 0.0

    @property
    def searching(self) -> bool:
        """Whether the coefficient has been raised, and the search is not over."""
        return self.error is None and self.log_share > _FIRST

    def see(self, sparsity: float, penalty: float) -> float:
        """Take the sparsity and the penalty of an update; returns ln of the smoothed density."""
        now = math.log(max(1 - sparsity, _FLOOR))
        if self.density is None:
            self.density = self.natural = now
            self.reference = max(penalty, _FLOOR)
        # Over as many updates as the loop is slow anyway, at most.
        self.density += (now - self.density) / max(3.0, min(10.0, self.horizon / 50))
        self.natural = max(self.natural, self.density)
        return self.density

    def search(self, most: float = 0.15) -> bool:
        """Raise ln(coefficient), by ``most`` at most; returns whether the density has answered."""
        assert self.density is not None
        # Three decades in a fifth of the horizon, if it is long enough to see what each does.
        pace = min(3 * math.log(10) / (0.2 * self.horizon), most)
        if self.density < self.natural - _NOTICEABLE:
            self.error = 0.0
            self.move(-_DELAY * pace)  # back to what has done that
            return True
        self.move(pace)
        return False

    def follow(self, wanted: float) -> None:
        """Move the coefficient for the density, its smoothed logarithm, to come to ``wanted``."""
        assert self.density is not None
        error = self.density - wanted
        before = error if self.error is None else self.error
        gain = min(max(self.horizon / _SLOW, 1.0), 8.0)
        self.move(gain * (error - before) + 0.8 * gain**2 * error / self.horizon)
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        """All of it, in JSON types."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def move(self, by: float) -> None:
        """Add to ln(coefficient), as far as it is clamped."""
        self.log_share = min(max(self.log_share + by, math.log(self.least)), _MOST)
