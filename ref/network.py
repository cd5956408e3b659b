"""Encoder, stack of blocks, decoder: the part that is the same for every model.

encoder   tokens (B, L): embedding; real input (B, L, C): linear   encoder.weight, encoder.bias
          learned absolute positions, when positions > 0           encoder.position
blocks    n_layers of the model's block, stacked on a first axis   blocks.<name>
norm      after the last block, when final_norm                    final.norm_*
decoder   mean: mean over a sequence's own length, then linear     decoder.weight, decoder.bias
          last: its last position, then linear
          match: of two documents, the rows i and B + i of 2B:     match.weight, match.bias
          linear ReLU linear of [p1, p2, p1 p2, p1 - p2], their means
          lm: every position, by the embedding (tied) or linear
"""

import dataclasses
import importlib
import math
from dataclasses import dataclass

from ref import Error, backend, block, nn
from ref.backend import array_module, check_choice

MODELS = ("hope", "s4", "s4d", "hyena", "longhorn", "mamba", "tnn", "transformer")
SETTINGS_OF = {"l2t-hyena": "hyena"}  # names for a model with other settings, those of its recipe
NAMES = (*MODELS, *SETTINGS_OF)
DECODERS = ("mean", "last", "match", "lm")


def model_module(name):
    """The module of a model.   Error: unknown name"""
    check_choice("model", name, NAMES)
    return importlib.import_module(f"ref.{SETTINGS_OF.get(name, name)}")


def part_width(name, part, layer):
    """Channels of the input of a model's part: d_model but for the scans' operators"""
    module = model_module(name)
    wide = part == "operator" and hasattr(module, "operator_width")
    return module.operator_width(layer) if wide else layer.d_model


@dataclass(frozen=True)
class Config:
    """A network around `layer`, the Config of the model's block."""

    model: str
    layer: object
    n_layers: int
    d_input: int  # vocabulary size, or channels of real-valued input
    d_output: int  # classes; for lm the vocabulary size
    tokens: bool = True
    decoder: str = "mean"
    tied: bool = False  # lm: the decoder is the embedding
    decoder_bias: bool = True  # of a decoder that is not tied
    final_norm: bool = False
    positions: int = 0  # learned absolute positions, the longest input; 0: none
    pool_from: int = 0  # mean and match: the first position that is pooled
    embedding_std: float = 0.0  # of the tokens' when it is made; 0: see init

    def __post_init__(self):
        check_choice("decoder", self.decoder, DECODERS)
        if self.n_layers < 1 or self.d_input < 1 or self.d_output < 1:
            raise Error(
                f"n_layers={self.n_layers}, d_input={self.d_input}, d_output={self.d_output}: "
                "expected at least 1 of each."
            )
        if not isinstance(self.layer, model_module(self.model).Config):
            raise Error(f"layer is {self.layer!r}: expected the Config of ref.{self.model}.")
        if self.pool_from and self.decoder not in ("mean", "match"):
            raise Error(f"pool_from={self.pool_from} is for decoder 'mean' or 'match'.")
        if self.positions < 0 or self.pool_from < 0:
            raise Error(
                f"positions={self.positions}, pool_from={self.pool_from}: expected 0 or more."
            )
        if not 0 <= self.embedding_std < math.inf or (self.embedding_std and not self.tokens):
            raise Error(
                f"embedding_std={self.embedding_std}: expected 0 or more, and finite; input that "
                "is no tokens has no embedding."
            )
        if self.decoder == "lm" and not self.layer.causal:
            raise Error(
                f"language modelling needs a causal map, and this {self.model} is not "
                "(hope: conv='causal'; the others: bidirectional=False)."
            )
        if self.tied and not (
            self.tokens and self.decoder == "lm" and self.d_input == self.d_output
        ):
            raise Error("tied=True needs tokens, decoder='lm' and d_output equal to d_input.")


def init(cfg, rng, dtype="float32"):
    """Parameters on the host: embedding normal, linear layers uniform in ±1/sqrt(inputs); beside
    learned positions, both normal with deviation 0.02 as in GPT-2; or with the model's own"""
    D, model = cfg.layer.d_model, model_module(cfg.model)

    def linear(name, inputs, outputs):
        r = 1 / math.sqrt(inputs)
        weight, bias = rng.uniform(-r, r, (outputs, inputs)), rng.uniform(-r, r, outputs)
        return {f"{name}.weight": weight.astype(dtype), f"{name}.bias": bias.astype(dtype)}

    deviation = 0.02 if cfg.positions else getattr(model, "EMBEDDING_DEVIATION", 1.0)
    if cfg.tokens:
        own = cfg.embedding_std or deviation
        params = {"encoder.weight": rng.standard_normal((cfg.d_input, D)) * own}
    else:
        params = linear("encoder", cfg.d_input, D)
    if cfg.positions:
        params["encoder.position"] = rng.standard_normal((cfg.positions, D)) * deviation
    params = {name: p.astype(dtype) for name, p in params.items()}
    xp = array_module(params["encoder.weight"])
    layers = [model.block_init(cfg.layer, rng, dtype) for _ in range(cfg.n_layers)]
    params |= {f"blocks.{name}": xp.stack([layer[name] for layer in layers]) for name in layers[0]}
    if cfg.final_norm:
        params |= _within("final.", block.norm_init(cfg.layer.norm, D, xp, dtype))
    if cfg.decoder == "match":
        params |= linear("match", 4 * D, D)
    if not cfg.tied:
        params |= linear("decoder", D, cfg.d_output)
    if not cfg.decoder_bias:
        params.pop("decoder.bias", None)
    return params


def _within(prefix, params):
    return {prefix + name: p for name, p in params.items()}


def _under(prefix, params):
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def layer_params(params, i):
    """Parameters of block i, as views"""
    return {name: p[i] for name, p in _under("blocks.", params).items()}


def forward(params, x, cfg, lengths=None, rng=None, state=None, where=None):
    """x (B, L) tokens or (B, L, C), lengths (B,) -> y (B, d_output); for match (B/2, d_output), for
    lm (B, L, d_output), or (n, d_output) of the n positions where `where` (B, L) is true.
    rng given: training;   state: of what came before x, for the scans

    Error: a token outside the vocabulary, a length outside pool_from+1..L, a wrong shape, a state
    where the model takes none.
    """
    _check_input(x, cfg, lengths)
    if where is not None and (cfg.decoder != "lm" or where.shape != x.shape[:2]):
        raise Error(f"where is for decoder 'lm' and has the shape {tuple(x.shape[:2])}.")
    model, xp = model_module(cfg.model), array_module(params["encoder.weight"])
    masked = {"lengths": lengths} if getattr(model, "MASKED", False) else {}
    if state is not None and not hasattr(model, "final_state"):
        raise Error(f"{cfg.model} goes on from a state by `step` alone; forward starts anew.")
    z, encoder = _encoded(params, x, cfg)
    blocks = []
    for i in range(cfg.n_layers):
        own = masked if state is None else masked | {"state": state["blocks"][i]}
        z, cache = model.block_forward(layer_params(params, i), z, cfg.layer, rng, **own)
        blocks.append(cache)
    final = pool = match = None
    if cfg.final_norm:
        z, final = block.norm_forward(_under("final.", params), z, cfg.layer.norm, rng is not None)
    if cfg.decoder != "lm":
        lengths = xp.full(len(x), x.shape[1]) if lengths is None else lengths
        if cfg.decoder == "last":
            z, pool = nn.last_forward(z, lengths)
        else:
            z, pool = nn.mean_pool_forward(z, lengths, cfg.pool_from)
    if cfg.decoder == "match":
        z, match = _match_forward(params, z)
    shape = z.shape
    if where is not None:
        z = z[where]
    W = params["encoder.weight" if cfg.tied else "decoder.weight"]
    y, decoder = nn.linear_forward(z, W, params.get("decoder.bias"))
    position = x.shape[1] + (0 if state is None else state["position"])
    return y, (cfg, encoder, blocks, final, pool, match, (decoder, where, shape, position))


def predict(params, batch, cfg, rng=None):
    """batch: x, targets, lengths, as `data` makes them -> logits (..., V) and targets (...), of the
    samples or of the positions with a target; cache.   rng given: training"""
    xp = array_module(params["encoder.weight"])
    x, targets, lengths = (backend.to_device(a, xp) for a in batch)
    if cfg.decoder != "lm":
        logits, cache = forward(params, x, cfg, lengths, rng)
    elif batch.targets.min() >= 0:
        logits, cache = forward(params, x, cfg, rng=rng)
    else:
        where = targets >= 0
        logits, cache = forward(params, x, cfg, rng=rng, where=where)
        targets = targets[where]
    return logits, targets, cache


def _encoded(params, x, cfg, first=0):
    """x (B, L) or (B, L, C), at the positions from `first` on -> z (B, L, D), encoder's cache"""
    if cfg.tokens:
        z, encoder = nn.embedding_forward(x, params["encoder.weight"])
    else:
        z, encoder = nn.linear_forward(x, params["encoder.weight"], params["encoder.bias"])
    if cfg.positions:
        z = z + params["encoder.position"][first : first + x.shape[1]]
    return z, encoder


def backward(dy, cache, dstate=None):
    """dy like y -> dx (None for tokens), grads with the names and shapes of the trained params

    dstate: the gradient of final_state(cache). That of a state that forward was given stands in
    grads as blocks.state.<name>, (n_layers, ...); `state_gradient` takes it out.
    """
    cfg, encoder, blocks, final, pool, match, decoder = cache
    model, xp, grads = model_module(cfg.model), array_module(dy), {}
    decoder, where, shape, _ = decoder
    dz, dW, db = nn.linear_backward(dy, decoder)
    if not cfg.tied:
        grads |= {"decoder.weight": dW} | ({"decoder.bias": db} if cfg.decoder_bias else {})
    if where is not None:
        chosen, dz = dz, xp.zeros(shape, dtype=dz.dtype)
        dz[where] = chosen
    if cfg.decoder == "match":
        dz, match_grads = _match_backward(dz, match)
        grads |= match_grads
    if cfg.decoder != "lm":
        dz = (nn.last_backward if cfg.decoder == "last" else nn.mean_pool_backward)(dz, pool)
    if cfg.final_norm:
        dz, final_grads = block.norm_backward(dz, final)
        grads |= _within("final.", final_grads)
    for i in reversed(range(cfg.n_layers)):
        after = {} if dstate is None else {"dstate": dstate["blocks"][i]}
        dz, layer_grads = model.block_backward(dz, blocks[i], **after)
        for name, g in layer_grads.items():
            if i == cfg.n_layers - 1:
                grads[f"blocks.{name}"] = xp.empty((cfg.n_layers, *g.shape), dtype=g.dtype)
            grads[f"blocks.{name}"][i] = g
    if cfg.positions:
        own, L = dz.sum(axis=0), dz.shape[1]
        grads["encoder.position"] = xp.zeros((cfg.positions, own.shape[1]), dtype=own.dtype)
        grads["encoder.position"][:L] = own
    if cfg.tokens:
        dx, grads["encoder.weight"] = None, nn.embedding_backward(dz, encoder)
    else:
        dx, grads["encoder.weight"], grads["encoder.bias"] = nn.linear_backward(dz, encoder)
    if cfg.tied:
        grads["encoder.weight"] += dW  # both are fresh, and large with a large vocabulary
    return dx, grads


def _match_forward(params, p):
    """Pooled features p (2B, D), first documents first -> (B, D)"""
    xp, B = array_module(p), len(p) // 2
    p1, p2 = p[:B], p[B:]
    features = xp.concatenate([p1, p2, p1 * p2, p1 - p2], axis=1)
    a, linear = nn.linear_forward(features, params["match.weight"], params["match.bias"])
    z, relu = nn.relu_forward(a)
    return z, (p1, p2, linear, relu)


def _match_backward(dz, cache):
    """dz (B, D) -> dp (2B, D), grads"""
    p1, p2, linear, relu = cache
    xp = array_module(dz)
    da = nn.relu_backward(dz, relu)
    dfeatures, dW, db = nn.linear_backward(da, linear)
    d1, d2, dproduct, ddifference = xp.split(dfeatures, 4, axis=1)
    dp1, dp2 = d1 + dproduct * p2 + ddifference, d2 + dproduct * p1 - ddifference
    return xp.concatenate([dp1, dp2]), {"match.weight": dW, "match.bias": db}


# Recurrent form


def state(params, cfg, batch, systems=None):
    """What decoding knows before the first position.   Error: a block is not causal

    systems: for each block the etsc.System of each of its long filters, to decode by; None: the
    model's own form
    """
    model, blocks = model_module(cfg.model), []
    for i in range(cfg.n_layers):
        own = {} if systems is None else {"systems": systems[i]}
        blocks.append(model.state(layer_params(params, i), cfg.layer, batch, **own))
    return {"position": 0, "blocks": blocks}


def step(params, x_t, state, cfg):
    """One position of a language model.   x_t (B,) tokens or (B, C) -> logits (B, d_output), state

    Error: a token outside the vocabulary, another decoder, no position left
    """
    t, z = _entered(params, x_t[:, None], state, cfg)
    model, z, blocks = model_module(cfg.model), z[:, 0], []
    for i in range(cfg.n_layers):
        z, own = model.step(layer_params(params, i), z, state["blocks"][i], cfg.layer)
        blocks.append(own)
    return _decoded(params, z, cfg), {"position": t + 1, "blocks": blocks}


def prefill(params, x, cfg, state):
    """The first positions of a language model at once.   x (B, L) or (B, L, C), a fresh state ->
    logits (B, d_output) of the last position, state after it; as L steps give them, to rounding

    Models with neither `prefill` nor `final_state` go step by step.   Error: as of `step`
    """
    model, L = model_module(cfg.model), x.shape[1]
    if hasattr(model, "final_state"):
        where = array_module(params["encoder.weight"]).zeros(x.shape[:2], dtype=bool)
        where[:, -1] = True
        logits, cache = forward(params, x, cfg, state=state, where=where)
        return logits, final_state(cache)
    if not hasattr(model, "prefill"):
        for t in range(L):
            logits, state = step(params, x[:, t], state, cfg)
        return logits, state
    t, z = _entered(params, x, state, cfg)
    blocks = []
    for i in range(cfg.n_layers):
        z, own = model.prefill(layer_params(params, i), z, cfg.layer, state["blocks"][i])
        blocks.append(own)
    return _decoded(params, z[:, -1], cfg), {"position": t + L, "blocks": blocks}


def _entered(params, x, state, cfg):
    """Decoding goes on with x (B, L) or (B, L, C).   -> its first position, z (B, L, D)"""
    if cfg.decoder != "lm":
        raise Error(f"decoder={cfg.decoder!r} sees a whole sequence; only 'lm' goes step by step.")
    _check_input(x, dataclasses.replace(cfg, positions=0), None)
    t = state["position"]
    if 0 < cfg.positions < t + x.shape[1]:
        raise Error(f"the network has {cfg.positions} positions, and they are full.")
    return t, _encoded(params, x, cfg, t)[0]


def _decoded(params, z, cfg):
    """What forward does with the last block's output.   z (B, D), of one position -> logits"""
    if cfg.final_norm:
        z, _ = block.norm_forward(_under("final.", params), z, cfg.layer.norm, False)
    W = params["encoder.weight" if cfg.tied else "decoder.weight"]
    return nn.linear_forward(z, W, params.get("decoder.bias"))[0]


def final_state(cache):
    """The state after forward's input, from which step and forward go on; scans have one"""
    cfg, _, blocks, *_, (*_, position) = cache
    model = model_module(cfg.model)
    return {"position": position, "blocks": [model.final_state(own) for own in blocks]}


def state_gradient(grads):
    """Out of the gradients of backward that of the state which forward was given, as a state; for
    the backward of what came before it"""
    names = [name for name in grads if name.startswith("blocks.state.")]
    stacked = {name.rpartition(".")[2]: grads.pop(name) for name in names}
    layers = range(len(next(iter(stacked.values()))))
    return {"blocks": [{name: g[i] for name, g in stacked.items()} for i in layers]}


def stretch(params, cfg, length):
    """The same network where an input is so long: S4's C~ belongs to a length.   -> params, cfg

    Error: its learned positions or its filters end before that
    """
    model, longest = model_module(cfg.model), getattr(cfg.layer, "l_max", 0)
    if 0 < cfg.positions < length:
        raise Error(f"the network has {cfg.positions} learned positions: {length} do not fit.")
    if hasattr(model, "BOUNDED") and longest < length:
        raise Error(f"{cfg.model}'s filters end at l_max={longest}: {length} positions do not fit.")
    while hasattr(model, "double_length") and 0 < cfg.layer.l_max < length:
        layers = [
            model.double_length(layer_params(params, i), cfg.layer) for i in range(cfg.n_layers)
        ]
        C = array_module(params["encoder.weight"]).stack([own["C"] for own, _ in layers])
        params, cfg = params | {"blocks.C": C}, dataclasses.replace(cfg, layer=layers[0][1])
    return params, cfg


def running_statistics(params, cache):
    """The running moments after a training batch, by name: what `params` is to be updated with"""
    cfg, _, blocks, final, *_ = cache
    model, xp, new = model_module(cfg.model), array_module(params["encoder.weight"]), {}
    layers = [
        model.running_statistics(layer_params(params, i), blocks[i]) for i in range(cfg.n_layers)
    ]
    for name in layers[0]:
        new[f"blocks.{name}"] = xp.stack([layer[name] for layer in layers])
    if cfg.final_norm:
        new |= _within("final.", block.norm_running(_under("final.", params), final))
    return new


def groups(params, cfg):
    """name -> the optimiser's group: main, ssm, dt, nodecay, slow, or frozen (not trained)"""
    special = model_module(cfg.model).groups(cfg.layer)

    def group(name):
        last = name.rpartition(".")[2]
        return "frozen" if last in ("norm_mean", "norm_var") else special.get(last, "main")

    return {name: group(name) for name in params}


def is_buffer(name, model, layer):
    """Whether a parameter is one of the model's constants, of which there is no gradient"""
    module = model_module(model)
    return hasattr(module, "buffers") and name.rpartition(".")[2] in module.buffers(layer)


def _check_input(x, cfg, lengths):
    if (
        x.ndim != (2 if cfg.tokens else 3)
        or 0 in x.shape
        or not (cfg.tokens or x.shape[2] == cfg.d_input)
    ):
        expected = "(B, L) tokens" if cfg.tokens else f"(B, L, {cfg.d_input})"
        raise Error(
            f"input has shape {tuple(x.shape)}; expected {expected} with B and L at least 1."
        )
    if cfg.tokens and x.dtype.kind not in "iu":
        raise Error(f"tokens have dtype {x.dtype}; expected integers.")
    if cfg.tokens:
        low, high = backend.item(x.min()), backend.item(x.max())
        if low < 0 or high >= cfg.d_input:
            raise Error(
                f"token {low if low < 0 else high} is outside the vocabulary of {cfg.d_input}."
            )
    B, L = x.shape[:2]
    if cfg.positions and cfg.positions < L:
        raise Error(f"the input is {L} long, but the network has {cfg.positions} positions.")
    if cfg.decoder == "match" and B % 2:
        raise Error(f"a batch of {B}: decoder='match' compares two documents, rows i and B + i.")
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype.kind not in "iu"):
        raise Error(
            f"lengths have shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
            f"expected ({B},) integers."
        )
    if lengths is None:
        shortest, longest = L, L
    else:
        shortest, longest = backend.item(lengths.min()), backend.item(lengths.max())
    if shortest <= cfg.pool_from or longest > L:
        raise Error(f"lengths must lie between {cfg.pool_from + 1} and {L}, the padded length.")


# Names of the published code: a model says where a layer's names stand within its network, and, in
# PUBLISHED_NETWORK or published_network(layer), what it calls the parameters outside of the layers


def from_published(tensors, cfg):
    """The published state dict of a network -> params.   Error: what is tied differs"""
    tensors = block.untied(tensors, published_aliases(cfg))
    model, layers = model_module(cfg.model), []
    for i in range(cfg.n_layers):
        own = {}
        for ours, theirs in _layer_names(model, cfg.layer):
            own |= _within(ours, _under(theirs.format(i=i), tensors))
        layers.append(model.from_published(own, cfg.layer, "block"))
    names = outside_names(cfg.model, cfg.layer)
    params = {names[name]: t for name, t in tensors.items() if name in names}
    if "encoder.position" in params:  # some have a leading axis of 1
        params["encoder.position"] = params["encoder.position"].reshape(cfg.positions, -1)
    xp = array_module(next(iter(tensors.values())))
    return params | {
        f"blocks.{name}": xp.stack([layer[name] for layer in layers]) for name in layers[0]
    }


def to_published(params, cfg):
    """params (or their gradients) -> the published names and shapes"""
    model = model_module(cfg.model)
    names = {ours: theirs for theirs, ours in outside_names(cfg.model, cfg.layer).items()}
    tensors = {names[name]: p for name, p in params.items() if name in names}
    if cfg.tied and hasattr(model, "lists_tied_head") and model.lists_tied_head(cfg.layer):
        tensors[names["decoder.weight"]] = params["encoder.weight"]
    if "encoder.position" in params and getattr(model, "POSITIONS_HAVE_BATCH", False):
        tensors[names["encoder.position"]] = params["encoder.position"][None]
    for i in range(cfg.n_layers):
        own = model.to_published(layer_params(params, i), cfg.layer, "block")
        for ours, theirs in _layer_names(model, cfg.layer):
            tensors |= _within(theirs.format(i=i), _under(ours, own))
    return tensors


def _layer_names(model, layer):
    """Prefixes of a block's published names, and what they are within a network, for layer {i}"""
    by_layer = getattr(model, "published_layer", None)
    return (by_layer(layer) if by_layer else model.PUBLISHED_LAYER).items()


def outside_names(model, layer):
    """Published name -> ours, of the parameters outside of the layers"""
    ours = [
        f"{part}.{kind}" for part in ("encoder", "match", "decoder") for kind in ("weight", "bias")
    ]
    ours += ["encoder.position", *(f"final.{name}" for name in block.PUBLISHED_NORM)]
    module = model_module(model)
    if hasattr(module, "published_network"):
        theirs = module.published_network(layer)
    else:
        theirs = getattr(module, "PUBLISHED_NETWORK", {})
    return {theirs.get(name, name): name for name in ours}


def published_aliases(cfg):
    """{name: the other published name of the same tensor}: a tied head is the embedding; and what
    the model ties in each layer"""
    model, tied = model_module(cfg.model), {}
    if cfg.tied:
        ours = {own: name for name, own in outside_names(cfg.model, cfg.layer).items()}
        tied[ours["decoder.weight"]] = ours["encoder.weight"]
    if not hasattr(model, "published_aliases"):
        return tied
    own = model.published_aliases(cfg.layer, "block")
    for i in range(cfg.n_layers):
        for below, there in _layer_names(model, cfg.layer):
            prefix = there.format(i=i)
            named = _within(prefix, _under(below, own))
            tied |= {name: prefix + other.removeprefix(below) for name, other in named.items()}
    return tied


def published_buffers(cfg):
    """The layers' published tensors that are no parameters, such as the length S4's C~ is for"""
    model, tensors = model_module(cfg.model), {}
    own = model.published_buffers(cfg.layer, "block")
    for i in range(cfg.n_layers):
        for ours, theirs in _layer_names(model, cfg.layer):
            tensors |= _within(theirs.format(i=i), _under(ours, own))
    return tensors
