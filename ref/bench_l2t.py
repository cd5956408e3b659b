"""`python -m ref bench l2t`: what a step of the student costs with each teacher, relative to a step
on cross-entropy alone, and the memory that it adds.

The student is the one of the study in the README: two gated layers of width 64 on windows of 64
tokens of 10,000 kinds, batches of 16; the small forms are for trying it. A round of K steps counts
as K. All are interleaved in one process.
"""

import tracemalloc
from typing import NamedTuple

import numpy as np

from ref import bench, hyena, l2t, network, optim, presets, rounds, teaching

SIZES = {"V": 10_000, "B": 16, "L": 64, "D": 64}
SMALL = {"V": 50, "B": 2, "L": 8, "D": 4}
RELEASED = {"teacher": "released"}
CORRECTED = RELEASED | l2t.CORRECTED
HYPERGRAD = teaching.SMALL | {"teacher": "hypergrad"}
LSTM = teaching.SMALL | {"teacher": "lstm"}
MODES = {
    "none": {"teacher": "none"},
    "static": {"teacher": "static"},
    "released": RELEASED,
    "released, corrected": CORRECTED,
    "hypergrad, K = 1": HYPERGRAD,
    "hypergrad, K = 1, first steps kept": HYPERGRAD | {"commit": "first"},
    "hypergrad, K = 1, differences": HYPERGRAD | {"hvp": "differences"},
    "hypergrad, K = 3": HYPERGRAD | {"inner_steps": 3},
    "hypergrad, K = 3, differences": HYPERGRAD | {"inner_steps": 3, "hvp": "differences"},
    "lstm, K = 1": LSTM,
    "lstm, K = 3": LSTM | {"inner_steps": 3},
}


class Batch(NamedTuple):
    """As those of data.py."""

    x: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def run(count, malloc="keep", small=False):
    """Print the table, medians of `count` rounds.   -> {mode: seconds of a step}"""
    print(bench.environment(np, None, malloc))
    problems = {
        name: Problem(chosen, **(SMALL if small else SIZES)) for name, chosen in MODES.items()
    }
    calls = {name: problem.step for name, problem in problems.items()}
    times = bench.interleaved(calls, count, np)
    times = {name: np.array(own) / problems[name].teacher.steps for name, own in times.items()}
    base = np.median(times["none"])
    print(f"\n{'a step of the student':36} {'ms':>8} {'ratio':>7} {'memory, in parameters':>22}")
    for name, own in times.items():
        tracemalloc.start()
        problems[name].step()
        added = tracemalloc.get_traced_memory()[1] / problems[name].size
        tracemalloc.stop()
        print(f"{name:36} {1e3 * np.median(own):8.1f} {np.median(own) / base:7.2f} {added:22.1f}")
    return {name: float(np.median(own)) for name, own in times.items()}


class Problem:
    """A student and its teacher."""

    def __init__(self, chosen, V, B, L, D):
        self.V, self.B, self.L, self.done = V, B, L, 0
        layer = hyena.Config(
            d_model=D, l_max=L, filter="gated", recurrence="residual", block="bare", dropout=0.15
        )
        outer = {"decoder": "lm", "tied": True, "final_norm": True, "positions": L}
        self.cfg, self.recipe = network.Config("hyena", layer, 2, V, V, **outer), presets.Recipe()
        self.rng, own = np.random.default_rng(0), teaching.Config(**chosen)
        self.params = network.init(self.cfg, self.rng)
        self.size = sum(p.nbytes for p in self.params.values())
        self.groups = dict.fromkeys(self.params, optim.Group(1e-3, 0.1))
        self.moments = optim.adamw_init(self.params)
        if own.in_rounds:
            given = self.cfg, self.groups, self.recipe, self.batch, 0, "float32"
            self.teacher = rounds.Rounds(own, *given)
        elif own.teacher == "released":
            self.teacher = teaching.Released(own, 0, L, "float32")
        else:
            self.teacher = teaching.Static(own, 0)
        if own.teacher == "none":
            self.teacher = teaching.CrossEntropy()

    def batch(self, rng):
        """Words as rare as Zipf has them"""
        tokens = np.minimum(rng.zipf(1.3, (self.B, self.L + 1)) - 1, self.V - 1)
        return Batch(tokens[:, :-1].astype("int32"), tokens[:, 1:], np.full(self.B, self.L))

    def step(self):
        """A round, or a step"""
        batches = [self.batch(self.rng) for _ in range(self.teacher.steps)]
        own, total = (self.params, self.moments), 10**6
        if self.teacher.in_rounds:
            given = batches, self.done + 1, total, lambda step: 1.0
            self.params, self.moments, _ = self.teacher.round(*own, *given)
        else:
            given = batches[0], self.done + 1, self.done + 1, total, 1.0, self.teacher
            teaching.train_step(*own, *given, self.cfg, self.recipe, self.groups, 0)
        self.done += self.teacher.steps
