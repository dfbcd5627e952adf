"""Where the time of a decoding step goes: in the kernels of the package, and around them.

    python benchmarks/step.py                                # the shape of Llama-3.2-1B
    python benchmarks/step.py --model DIR --compile          # a folder that transformers can load

The forms of a model with FATReLU thresholds that silence ``--sparsity`` of its neurons, on the CPU: patched;
prepared, whose other linear layers use the kernels as well; certified, output included; compiled. All take
turns. A step is a token after the first, of greedy ``generate()``. "Around" is what is no call of a kernel:
norms, attention and other operators of torch, the Python of transformers and ours, ``generate()`` itself.
The clock is read before and after each call of the compiled library, which takes less than a microsecond, and
some where a graph calls it, which otherwise has no Python there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import generate
import harness
import peers
import torch

from triton_ops.cpu import backend, operators

KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class Clock:
    """The compiled library, with the time that is spent in it."""

    def __init__(self) -> None:
        self._library = backend.kernels()
        self.seconds, self.calls = 0.0, 0

    def __getattr__(self, name: str) -> Callable[[bytes], Any]:
        return self.timed(getattr(self._library, name))

    def timed(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The function with the clock."""

        def run(call: Any) -> Any:
            start = time.perf_counter()
            result = function(call)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        return run


def main() -> None:
    parser = harness.parser(__doc__, repeats=7)
    generate.add_model(parser)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="one form more: a compiled step")
    args = parser.parse_args()
    args.device, args.static_cache, args.int8 = "cpu", False, False
    conditions = harness.begin(args)
    stock = generate.model_of(args)
    tokens = torch.randint(1, stock.config.vocab_size, (4, 64))
    models = peers.variants(stock, tokens, args)
    del models["stock"]
    with measured() as clock:
        found = by_turns(models, tokens[:1, : args.prompt_tokens], args, clock)
    rows = [row(name, steps, stock, args) for name, steps in found.items()]
    print(harness.table([cells(one) for one in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


@contextmanager
def measured() -> Iterator[Clock]:
    """In here the kernels have a clock."""
    library, clock, native = backend.kernels, Clock(), operators.library()
    kernels = [ctypes.cast(getattr(library(), name), ctypes.c_void_p) for name in operators.KERNELS]
    with_clock = [KERNEL(clock.timed(KERNEL(one.value))) for one in kernels]
    backend.kernels = lambda: clock  # type: ignore[assignment]
    try:
        if not isinstance(native, str):
            native.hfs_connect(*(ctypes.cast(one, ctypes.c_void_p) for one in with_clock), False)
        yield clock
    finally:
        backend.kernels = library
        if not isinstance(native, str):
            native.hfs_connect(*kernels, False)


def by_turns(models: dict[str, Any], prompt: torch.Tensor, args: Any, clock: Clock) -> dict[str, list[Any]]:
    """What :meth:`Steps.measured` gives of each model, in each turn but the first."""
    runs = {name: Steps(model, prompt, args, clock) for name, model in models.items()}
    found: dict[str, list[Any]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            steps = run.measured()
            if repeat:
                found[name].append(steps)
    return found


class Steps:
    """``generate()`` of one form of the model, and what its steps take."""

    def __init__(self, model: Any, prompt: torch.Tensor, args: Any, clock: Clock) -> None:
        self._model, self._prompt, self._args, self._clock = model, prompt, args, clock
        self._marks: list[tuple[float, float, int]] = []

    def measured(self) -> tuple[float, float, float]:
        """Seconds of a step, those in kernels, and calls of kernels: the mean over the steps of one call."""
        self._marks = []
        generate.generation(self._model, self._prompt, "auto", self._args, streamer=self)()
        first, last, steps = self._marks[1], self._marks[-1], len(self._marks) - 2
        total, inside, calls = (b - a for a, b in zip(first, last, strict=True))
        return total / steps, inside / steps, calls / steps

    def put(self, _: torch.Tensor) -> None:
        """As of any streamer: ``generate()`` has the prompt, and then a token."""
        self._marks.append((time.perf_counter(), self._clock.seconds, self._clock.calls))

    def end(self) -> None:
        """As of any streamer."""


def row(name: str, steps: list[tuple[float, float, float]], stock: Any, args: Any) -> dict[str, Any]:
    """What is told of one form."""
    config = stock.config
    return {
        "model": name,
        "step": harness.Timing.of([total for total, _, _ in steps]),
        "kernels": harness.Timing.of([inside for _, inside, _ in steps]),
        "around": harness.Timing.of([total - inside for total, inside, _ in steps]),
        "calls": round(steps[-1][2], 1),
        "of": "random" if args.model is None else args.model.name,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "neurons": config.intermediate_size,
        "sparsity": args.sparsity,
        "dtype": args.dtype,
        "new_tokens": args.new_tokens,
    }


def cells(one: dict[str, Any]) -> dict[str, str]:
    return {
        "model": one["model"],
        **{f"{part}, ms": f"{one[part].median_ms:.1f}" for part in ("step", "kernels", "around")},
        "calls": f"{one['calls']:.0f}",
    }


if __name__ == "__main__":
    main()
