"""The controller on models of a model, whose answer to a coefficient it does not know."""

from __future__ import annotations

import json
import math

import pytest

from hf_sparse.levers.control import DensityControl


class Plant:
    """ln(density) falls with the share of the penalty in the gradient, and comes back by itself.

    Both through the memory of Adam, and times the learning rate. ``unit`` is the coefficient that halves the
    gradient of the task; the penalty is measured in another unit.
    """

    def __init__(self, unit: float, *, speed: float = 0.05, back: float = 0.02) -> None:
        self.unit, self.speed, self.back = unit, speed, back
        self.density, self.push = math.log(0.5), 0.0

    def step(self, coefficient: float, rate: float) -> float:
        share = coefficient / (coefficient + self.unit)
        self.push += 0.1 * (share - self.push)
        pull = self.back * (math.log(0.5) - self.density)
        self.density += rate * (pull - self.speed * self.push)
        return 1 - math.exp(self.density)


def run(plant: Plant, steps: int, target: float, penalty: float, store: bool = False) -> list[float]:
    control, horizon = DensityControl(0.5 * steps), 0.5 * steps
    found, begin = [], None
    for step in range(1, steps + 1):
        if store:
            state, control = json.loads(json.dumps(control.state_dict())), DensityControl(0.5 * steps)
            control.load_state_dict(state)
        rate = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        found.append(plant.step(control.coefficient, rate))
        density = control.see(found[-1], penalty)
        if begin is None and control.search():
            begin = step, density
        if begin is not None:
            passed = min((step - begin[0]) / (horizon - begin[0]), 1)
            control.follow(begin[1] + passed * (math.log(1 - target) - begin[1]))
    return found


@pytest.mark.parametrize("steps", [500, 1000, 5000])
@pytest.mark.parametrize("unit", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("target", [0.6, 0.9, 0.97])
def test_models_that_differ_by_decades_come_to_the_same_sparsity(steps, unit, target) -> None:
    plant = Plant(unit, speed=max(0.05, 15 / steps), back=min(0.02, 6 / steps))
    # What halves the gradient of the task is a tenth of a nat, one, or ten.
    found = run(plant, steps, target, penalty=unit**-0.5)
    assert found[-1] == pytest.approx(target, abs=0.01)
    assert max(found) < 1 - 0.7 * (1 - target)  # it does not shoot far over it on the way
    held = found[int(0.7 * steps) :]
    assert max(held) - min(held) < 0.15 * (1 - target) + 0.01


def test_its_state_in_json_is_all_of_it() -> None:
    assert run(Plant(0.3), 200, 0.8, 0.1) == run(Plant(0.3), 200, 0.8, 0.1, store=True)


def test_the_formula_by_hand() -> None:
    control = DensityControl(64.0)  # P = 64 / 32 = 2, I = 0.8 * 4 = 3.2
    assert control.coefficient == 0
    assert control.see(0.5, 4.0) == math.log(0.5)
    assert control.coefficient == pytest.approx(0.01 / 4)
    assert not control.search()
    assert control.coefficient == pytest.approx(0.01 / 4 * math.exp(0.15))
    assert control.see(0.6, 9.0) == pytest.approx(math.log(0.5) + math.log(0.4 / 0.5) / 3)
    assert control.search()  # it fell by 7 %
    before = control.log_share
    control.follow(control.density - 0.3)
    control.follow(control.density - 0.2)
    moved = 2 * (0.3 - 0) + 3.2 * 0.3 / 64 + 2 * (0.2 - 0.3) + 3.2 * 0.2 / 64
    assert control.log_share - before == pytest.approx(moved)


def test_a_model_that_does_not_answer_winds_nothing_up() -> None:
    control = DensityControl(100.0)
    for _ in range(500):
        control.see(0.5, 1.0)
        control.search()
    assert control.coefficient == pytest.approx(1e3)
    control.error = 0.0
    for _ in range(500):
        control.see(0.5, 1.0)
        control.follow(math.log(0.1))
    highest = control.log_share
    for _ in range(40):
        control.see(0.99, 1.0)
        control.follow(math.log(0.1))
    assert control.log_share < highest - 1
