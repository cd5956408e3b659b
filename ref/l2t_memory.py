"""The memory of ref.l2t: a ring of (features, CE), sampled by (9) there.

Nothing is written in place: writing gives a new memory.
"""

import numpy as np

from ref import Error, backend
from ref.backend import array_module

CHANNELS = 5  # of the features


def memory_init(cfg, S, xp=np, dtype="float32"):
    """An empty ring of memory_size sequences of length S: F, CE, where to write, how many there"""
    n = cfg.memory_size
    F, ce = xp.zeros((n, S, CHANNELS), dtype=dtype), xp.zeros(n, dtype=dtype)
    return {"features": F, "ce": ce, "at": 0, "count": 0}


def memory_write(memory, F, ce):
    """F (B, S, 5), ce (B,) in the places of the oldest.   Error: the memory is smaller"""
    n, B = len(memory["ce"]), len(ce)
    if n < B:
        raise Error(f"a memory of {n} entries is smaller than the batch of {B}: make it larger.")
    if F.shape != (B, *memory["features"].shape[1:]):
        expected = (B, *memory["features"].shape[1:])
        raise Error(f"features {tuple(F.shape)}: this memory takes {expected}.")
    xp = array_module(ce)
    where = (xp.arange(B) + memory["at"]) % n
    features, kept = memory["features"].copy(), memory["ce"].copy()
    features[where], kept[where] = F, ce
    at, count = (memory["at"] + B) % n, min(memory["count"] + B, n)
    return {"features": features, "ce": kept, "at": at, "count": count}


def sampling_probabilities(ce, uniform, cfg):
    """(9).   ce, uniform (n,) on the host -> π (n,) float64, summing to 1"""
    scaled = ce.astype("float64") / cfg.temperature
    softmax = np.exp(scaled - scaled.max())
    weight = 0.5 * softmax / softmax.sum() + 0.5 / len(ce) + cfg.noise * uniform
    return weight / weight.sum()


def memory_sample(memory, B, cfg, rng):
    """B entries with replacement, by (9) -> F (B, S, 5), ce (B,); zeros while there are fewer"""
    features, ce, count = (memory[n] for n in ("features", "ce", "count"))
    xp = array_module(ce)
    if count < B:
        return xp.zeros((B, *features.shape[1:]), dtype=ce.dtype), xp.zeros(B, dtype=ce.dtype)
    p = sampling_probabilities(backend.to_host(ce[:count]), rng.random(count), cfg)
    picked = np.searchsorted(np.cumsum(p), rng.random(B), side="right")
    picked = backend.to_device(np.minimum(picked, count - 1), xp)  # the sum may end below 1
    return features[picked], ce[picked]


def memory_exchange(memory, F, ce, cfg, rng):
    """Write the batch and take a sample of its size -> memory, F, ce.   Error: as memory_write"""
    if cfg.write_first:
        memory = memory_write(memory, F, ce)
        return memory, *memory_sample(memory, len(ce), cfg, rng)
    sample = memory_sample(memory, len(ce), cfg, rng)
    return memory_write(memory, F, ce), *sample
