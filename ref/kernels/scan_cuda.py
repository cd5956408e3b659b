"""What the launchers of mamba.cu and longhorn.cu share: how time is split, and tiles of it."""

from ref.backend import array_module

STEPS = 16  # of time in a chunk, as in the .cu files
CHANNELS = 64  # over which one thread adds up what all channels share: dB and dC
FULL = 1 << 15  # threads that keep a card busy


def split(B, L, E):
    """-> chunks, span, parts: span chunks make a part of time, which one thread takes.

    One part where the channels alone fill the card, for parts cost a second run through most of
    them; otherwise so many that it is full four times.
    """
    chunks = -(-L // STEPS)
    span = chunks if B * E >= FULL else -(-chunks * B * E // (4 * FULL))
    return chunks, span, -(-chunks // span)


def tiles(x):
    """x (B, L, N) -> (B, chunks, N, STEPS), zeros beyond L"""
    (B, L, N), xp = x.shape, array_module(x)
    chunks = -(-L // STEPS)
    padded = xp.zeros((B, chunks * STEPS, N), dtype=x.dtype)
    padded[:, :L] = x
    result = xp.empty((B, chunks, N, STEPS), dtype=x.dtype)
    result[...] = padded.reshape(B, chunks, STEPS, N).transpose(0, 1, 3, 2)
    return result


def sum_tiles(parts, L):
    """The sum of tiles over blocks.   parts (blocks, B, chunks, N, STEPS) -> (B, L, N)"""
    _, B, chunks, N, _ = parts.shape
    x = parts.sum(axis=0, dtype="float64").transpose(0, 1, 3, 2).reshape(B, chunks * STEPS, N)
    return x[:, :L].astype(parts.dtype, order="C")


def states_with(given, chunk, states):
    """states (chunks + 1, B, N, E), those at one chunk set to given (B, E, N), or None for zeros"""
    states[chunk] = 0 if given is None else given.transpose(0, 2, 1)
    return states


def states_at(chunk, states):
    """states (chunks + 1, B, N, E) -> a copy of those at one chunk (B, E, N)"""
    return states[chunk].transpose(0, 2, 1).copy()
