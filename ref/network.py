"""Encoder, stack of blocks, decoder: the part that is the same for every model.

encoder   tokens (B, L): embedding; real input (B, L, C): linear   encoder.weight, encoder.bias
blocks    n_layers of the model's block, stacked on a first axis   blocks.<name>
norm      after the last block, when final_norm                    final.norm_*
decoder   mean: mean over a sequence's own length, then linear     decoder.weight, decoder.bias
          last: its last position, then linear
          lm: every position, by the embedding (tied) or linear
"""

import importlib
import math
from dataclasses import dataclass

from ref import Error, backend, block, nn
from ref.backend import array_module, check_choice

MODELS = ("hope",)
DECODERS = ("mean", "last", "lm")


def model_module(name):
    """The module of a model.   Error: unknown name"""
    check_choice("model", name, MODELS)
    return importlib.import_module(f"ref.{name}")


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
    final_norm: bool = False

    def __post_init__(self):
        check_choice("decoder", self.decoder, DECODERS)
        if self.n_layers < 1 or self.d_input < 1 or self.d_output < 1:
            raise Error(
                f"n_layers={self.n_layers}, d_input={self.d_input}, d_output={self.d_output}: "
                "expected at least 1 of each."
            )
        if self.decoder == "lm" and not self.layer.causal:
            raise Error(
                f"language modelling needs a causal map, and this {self.model} is not "
                "(for hope: --conv causal)."
            )
        if self.tied and not (
            self.tokens and self.decoder == "lm" and self.d_input == self.d_output
        ):
            raise Error("tied=True needs tokens, decoder='lm' and d_output equal to d_input.")


def init(cfg, rng, dtype="float32"):
    """Parameters on the host: embedding normal, linear layers uniform in ±1/sqrt(inputs)"""
    D, model = cfg.layer.d_model, model_module(cfg.model)

    def linear(name, inputs, outputs):
        r = 1 / math.sqrt(inputs)
        weight, bias = rng.uniform(-r, r, (outputs, inputs)), rng.uniform(-r, r, outputs)
        return {f"{name}.weight": weight.astype(dtype), f"{name}.bias": bias.astype(dtype)}

    if cfg.tokens:
        params = {"encoder.weight": rng.standard_normal((cfg.d_input, D)).astype(dtype)}
    else:
        params = linear("encoder", cfg.d_input, D)
    xp = array_module(params["encoder.weight"])
    layers = [model.block_init(cfg.layer, rng, dtype) for _ in range(cfg.n_layers)]
    params |= {f"blocks.{name}": xp.stack([layer[name] for layer in layers]) for name in layers[0]}
    if cfg.final_norm:
        params |= _within("final.", block.norm_init(cfg.layer.norm, D, xp, dtype))
    return params if cfg.tied else params | linear("decoder", D, cfg.d_output)


def _within(prefix, params):
    return {prefix + name: p for name, p in params.items()}


def _under(prefix, params):
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def layer_params(params, i):
    """Parameters of block i, as views"""
    return {name: p[i] for name, p in _under("blocks.", params).items()}


def forward(params, x, cfg, lengths=None, rng=None):
    """x (B, L) tokens or (B, L, C), lengths (B,) -> y (B, d_output); for lm (B, L, d_output).
    rng given: training

    Error: a token outside the vocabulary, a length outside 1..L, a wrong shape.
    """
    _check_input(x, cfg, lengths)
    model, xp = model_module(cfg.model), array_module(params["encoder.weight"])
    if cfg.tokens:
        z, encoder = nn.embedding_forward(x, params["encoder.weight"])
    else:
        z, encoder = nn.linear_forward(x, params["encoder.weight"], params["encoder.bias"])
    blocks = []
    for i in range(cfg.n_layers):
        z, cache = model.block_forward(layer_params(params, i), z, cfg.layer, rng)
        blocks.append(cache)
    final = pool = None
    if cfg.final_norm:
        z, final = block.norm_forward(_under("final.", params), z, cfg.layer.norm, rng is not None)
    if cfg.decoder != "lm":
        lengths = xp.full(len(x), x.shape[1]) if lengths is None else lengths
        z, pool = (nn.mean_pool_forward if cfg.decoder == "mean" else nn.last_forward)(z, lengths)
    W = params["encoder.weight" if cfg.tied else "decoder.weight"]
    y, decoder = nn.linear_forward(z, W, params.get("decoder.bias"))
    return y, (cfg, encoder, blocks, final, pool, decoder)


def backward(dy, cache):
    """dy like y -> dx (None for tokens), grads with the names and shapes of the trained params"""
    cfg, encoder, blocks, final, pool, decoder = cache
    model, xp, grads = model_module(cfg.model), array_module(dy), {}
    dz, dW, db = nn.linear_backward(dy, decoder)
    if not cfg.tied:
        grads |= {"decoder.weight": dW, "decoder.bias": db}
    if cfg.decoder != "lm":
        dz = (nn.mean_pool_backward if cfg.decoder == "mean" else nn.last_backward)(dz, pool)
    if cfg.final_norm:
        dz, final_grads = block.norm_backward(dz, final)
        grads |= _within("final.", final_grads)
    for i in reversed(range(cfg.n_layers)):
        dz, layer_grads = model.block_backward(dz, blocks[i])
        for name, g in layer_grads.items():
            if i == cfg.n_layers - 1:
                grads[f"blocks.{name}"] = xp.empty((cfg.n_layers, *g.shape), dtype=g.dtype)
            grads[f"blocks.{name}"][i] = g
    if cfg.tokens:
        dx, grads["encoder.weight"] = None, nn.embedding_backward(dz, encoder)
    else:
        dx, grads["encoder.weight"], grads["encoder.bias"] = nn.linear_backward(dz, encoder)
    if cfg.tied:
        grads["encoder.weight"] = grads["encoder.weight"] + dW
    return dx, grads


def running_statistics(params, cache):
    """The running moments after a training batch, by name: what `params` is to be updated with"""
    cfg, _, blocks, final, _, _ = cache
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
    """name -> the optimiser's group: main, ssm, dt, or frozen (not trained, running moments)"""
    special = model_module(cfg.model).groups(cfg.layer)

    def group(name):
        last = name.rpartition(".")[2]
        return "frozen" if last in ("norm_mean", "norm_var") else special.get(last, "main")

    return {name: group(name) for name in params}


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
    if cfg.tokens:
        low, high = backend.item(x.min()), backend.item(x.max())
        if low < 0 or high >= cfg.d_input:
            raise Error(
                f"token {low if low < 0 else high} is outside the vocabulary of {cfg.d_input}."
            )
    if lengths is not None and (
        backend.item(lengths.min()) < 1 or backend.item(lengths.max()) > x.shape[1]
    ):
        raise Error(f"lengths must lie between 1 and {x.shape[1]}, the padded length.")


# Names of the published code: a model says where a layer's names stand within its network


def from_published(tensors, cfg):
    """The published state dict of a network -> params"""
    model, layers = model_module(cfg.model), []
    for i in range(cfg.n_layers):
        own = {}
        for ours, theirs in model.PUBLISHED_LAYER.items():
            own |= _within(ours, _under(theirs.format(i=i), tensors))
        layers.append(model.from_published(own, cfg.layer, "block"))
    params = {
        name: t
        for name, t in tensors.items()
        if name.startswith(("encoder.", "decoder.", "final."))
    }
    xp = array_module(next(iter(tensors.values())))
    return params | {
        f"blocks.{name}": xp.stack([layer[name] for layer in layers]) for name in layers[0]
    }


def to_published(params, cfg):
    """params (or their gradients) -> the published names and shapes"""
    model = model_module(cfg.model)
    tensors = {name: p for name, p in params.items() if not name.startswith("blocks.")}
    for i in range(cfg.n_layers):
        own = model.to_published(layer_params(params, i), cfg.layer, "block")
        for ours, theirs in model.PUBLISHED_LAYER.items():
            tensors |= _within(theirs.format(i=i), _under(ours, own))
    return tensors
