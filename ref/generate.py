"""Text from a trained language model, one token at a time: every token costs the same time and
memory, whatever came before it."""

import math
import sys
import time
from pathlib import Path

import numpy as np

from ref import Error, backend, convert, network, presets, runs

LINE_END = "<eos>"  # in a vocabulary of words
STARTS = ("\n", LINE_END)  # what an empty prompt is taken for, if the vocabulary has it


def generate(
    run, prompt, tokens, temperature, top_k, top_p, seed, method="auto", dtype=None, **how
):
    """`python -m ref generate`: print the prompt and its continuation as it comes; the speed goes
    to stderr. Ctrl-C ends it.   method, how: of convert.for_decoding; or "convolution"

    Error: no such run, one of no language model, or what is refused by `encode`, `sample` and
    convert.for_decoding
    """
    backend.set_threads(1)  # one token's work is too small to be shared out
    params, cfg, vocabulary = load(run, dtype)
    start = encode(prompt, vocabulary)
    rng = np.random.default_rng(seed)
    recompute, systems = method == "convolution", None
    if not recompute:
        systems = convert.for_decoding(params, cfg, method, len(start) + tokens - 1, **how)
    chosen = temperature, top_k, top_p, rng, systems, recompute
    continuation = sample(params, cfg, start, tokens, *chosen)
    if not recompute:
        network.step(params, np.array(start[:1]), network.state(params, cfg, 1, systems), cfg)
    print(prompt, end="", flush=True)
    shown, characters = prompt[-1:], _of_characters(vocabulary)
    count, began = 0, time.monotonic()
    try:
        for token in continuation:
            shown = vocabulary[token] if characters else _word(vocabulary[token], shown)
            print(shown, end="", flush=True)
            count += 1
    except KeyboardInterrupt:
        pass
    seconds = time.monotonic() - began
    print(flush=True)
    print(
        f"{count:,} tokens in {seconds:.1f} s, {count / max(seconds, 1e-9):,.0f} a second",
        file=sys.stderr,
    )


def load(run, dtype=None):
    """-> params, network.Config and vocabulary (a list of texts) of a run's language model

    dtype: of the params; None: as trained

    Error: no such run, one of another kind, a damaged one
    """
    run = Path(run)
    if not (run / "config.json").exists():
        raise Error(f"{run} holds no run: there is no config.json in it.")
    settings = presets.read_settings(run / "config.json")
    vocabulary = settings["vocabulary"]
    if not vocabulary:
        raise Error(
            f"{run} was trained on {settings['data']}, which is no text to go on with; expected a "
            "language model, such as one of --data shakespeare-char."
        )
    layer = network.model_module(settings["model"]).Config(**settings["layer"])
    cfg = presets.network_config(settings, layer, "lm", len(vocabulary), len(vocabulary))
    params = network.init(cfg, np.random.default_rng(0), settings["dtype"])
    params, *_ = runs.load_checkpoint(run / "checkpoint.safetensors", params)
    return {name: p.astype(dtype or p.dtype) for name, p in params.items()}, cfg, vocabulary


def _word(word, before):
    """What is printed for a word after `before`: <eos> ends the line, the others have spaces"""
    if word == LINE_END:
        return "\n"
    return word if before[-1:] in ("", " ", "\n") else f" {word}"


def encode(prompt, vocabulary):
    """Text -> token ids; an empty one is taken for a line's end, or for the vocabulary's first.

    Among words a line's end is <eos>, if the vocabulary has it.   Error: something that is not in
    the vocabulary
    """
    ids = {text: i for i, text in enumerate(vocabulary)}
    unit = "character" if _of_characters(vocabulary) else "word"
    if unit == "word" and LINE_END in ids:
        prompt = prompt.replace("\n", f" {LINE_END} ")
    pieces = list(prompt) if unit == "character" else prompt.split()
    if unknown := [piece for piece in pieces if piece not in ids]:
        raise Error(
            f"the prompt's {unit} {unknown[0]!r} is not among the {len(vocabulary):,} {unit}s that "
            f"the run was trained on.{' Write <unk> for it.' if '<unk>' in ids else ''}"
        )
    if not pieces:
        pieces = [next((start for start in STARTS if start in ids), vocabulary[0])]
    return [ids[piece] for piece in pieces]


def _of_characters(vocabulary):
    return all(len(text) == 1 for text in vocabulary)


def sample(
    params,
    cfg,
    prompt_tokens,
    n,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    rng=None,
    systems=None,
    recompute=False,
):
    """Generator of n tokens after prompt_tokens; see `choose`.   rng None: another one every time

    systems: of convert.systems, to decode by; None: the model's own recurrent form
    recompute: no recurrent form; the whole sequence again for each token, for comparison

    Error, at once: no prompt, a temperature, top_k or top_p that is none, more positions than the
    network or the conversion has, a network that is no causal language model
    """
    if not 0 <= temperature < math.inf:
        raise Error(f"temperature={temperature}: expected 0 (the likeliest token) or more.")
    if top_k < 0:
        raise Error(f"top_k={top_k}: expected 0 (no limit) or more.")
    if not 0 < top_p <= 1:
        raise Error(f"top_p={top_p}: expected more than 0 and at most 1 (no limit).")
    if len(prompt_tokens) == 0 or n < 0:
        raise Error(
            f"{len(prompt_tokens)} prompt tokens and n={n}: expected at least one to start from, "
            "and n of 0 or more."
        )
    state, room, holder = None, cfg.positions or math.inf, f"this {cfg.model} has"
    if recompute:
        longest = getattr(cfg.layer, "l_max", 0)
        if hasattr(network.model_module(cfg.model), "BOUNDED") and longest < room:
            room, holder = longest, f"the filters of this {cfg.model} have"
    else:
        state = network.state(params, cfg, 1, systems)
        horizon = convert.horizon(state)
        if horizon < room:
            room, holder = horizon, "the filters are converted for a horizon of"
    if room < len(prompt_tokens) + n - 1:  # the last token is not fed back
        raise Error(
            f"{len(prompt_tokens):,} prompt tokens and {n:,} more do not fit: {holder} {room:,} "
            f"positions. Ask for at most {max(0, room + 1 - len(prompt_tokens)):,} tokens, or "
            "shorten the prompt."
        )
    if recompute:
        params, cfg = network.stretch(params, cfg, len(prompt_tokens) + n - 1)
    rng = np.random.default_rng() if rng is None else rng
    return _sample(params, cfg, list(prompt_tokens), n, state, temperature, top_k, top_p, rng)


def _sample(params, cfg, tokens, n, state, temperature, top_k, top_p, rng):
    xp = backend.array_module(params["encoder.weight"])
    for i in range(n):
        if state is None:
            y, _ = network.forward(params, xp.asarray([tokens]), cfg)
            logits = y[:, -1]
        elif i == 0:
            logits, state = network.prefill(params, xp.asarray([tokens]), cfg, state)
        else:
            logits, state = network.step(params, xp.asarray(tokens[-1:]), state, cfg)
        tokens.append(choose(backend.to_host(logits)[0], temperature, top_k, top_p, rng))
        yield tokens[-1]


def choose(logits, temperature, top_k, top_p, rng):
    """A token from logits (V,): softmax(logits / temperature) among the top_k likeliest (0: all),
    and of those, with what they then have, the fewest that make up top_p

    Temperature 0 is the likeliest.   Error: a logit is not finite
    """
    logits = logits.astype("float64")
    if not np.isfinite(logits).all():
        raise Error("the network's logits are not finite.")
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: top_k or None]
    with np.errstate(over="ignore"):  # -inf at a very low temperature is right
        p = np.exp((logits[order] - logits[order[0]]) / temperature)
    up_to = np.cumsum(p / p.sum())
    if top_p < 1:
        up_to = up_to[: np.searchsorted(up_to, top_p) + 1]
    at = np.searchsorted(up_to, rng.random() * up_to[-1], side="right")
    return int(order[min(at, len(up_to) - 1)])
