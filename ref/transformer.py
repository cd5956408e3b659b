"""Transformer baseline.  Vaswani et al.: Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762,
section 3, with the norms where GPT-2 has them (Radford et al.: Language Models are Unsupervised
Multitask Learners, 2019, section 2.3).

Every position looks at all others, or, causal, at itself and those before it:

    q | k | v = LN(x) W_qkvᵀ + b_qkv,  each cut into H heads of d = D/H channels             (1)
    S = q kᵀ / sqrt(d),  -∞ where a key is masked                                            (2)
    P = softmax(S) over the keys,  o = P v                                                   (3)
    x' = x + o W_oᵀ + b_o                                                                    (4)
    y = x' + GELU(LN(x') W_1ᵀ + b_1) W_2ᵀ + b_2                                              (5)
    dv = Pᵀ do,  dP = do vᵀ,  dS = P (dP - Σ_keys P dP),  Σ_keys P dP = Σ_channels o do      (6)
    dq = dS k / sqrt(d),  dk = dSᵀ q / sqrt(d)                                               (7)

(2) and (3) run over blocks of queries, and all that is kept of P is one number a query, log Σ exp S
over its keys: (6) makes P again from that. Nothing of size L² is ever there, and memory is linear
in L.

    parameter       shape            B batch, L length, D channels, H heads, d channels of a head,
    norm1_*         (D,)             M channels of the MLP
    W_qkv, b_qkv    (3D, D), (3D,)   rows in the order q, k, v; of each, head after head
    W_o, b_o        (D, D), (D,)
    norm2_*         (D,)
    W_1, b_1        (M, D), (M,)
    W_2, b_2        (D, M), (D,)

The operator is the attention with its projections, (1) to (4) without norm and residual. The mixer
is the same map, the block is (1) to (5). LN is the layer norm, GELU its tanh form. Learned
positions, final norm and tied head are the network's.

Differences from the published code (GPT-2, in transformers):
- It stores W as (inputs, outputs); here W is (outputs, inputs) as everywhere.
- Its dropout acts on both residual branches, as here, but also on P and on the embedding.
- bidirectional=True drops the causal mask. With `lengths` no query sees the keys beyond the length
  of its sequence; outputs there are computed like others, and are nobody's business.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from ref import Error, backend, block, checkpoints, files, network, nn
from ref.backend import array_module, check_activations, check_choice, twins

MASKED = True  # the parts take `lengths`


@dataclass(frozen=True)
class Config:
    """The Transformer's layer."""

    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 0  # M; 0: 4 d_model
    bidirectional: bool = False
    context: int = 1024  # positions that decoding has room for
    depth: int = 12  # layers whose outputs add up on the residual: their initial scale
    block: int = 128  # queries at a time
    dropout: float = 0.0

    norm = "layer"
    prenorm = True

    def __post_init__(self):
        for name in ("d_model", "n_heads", "context", "depth", "block"):
            if getattr(self, name) < 1:
                raise Error(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.d_model % self.n_heads:
            raise Error(f"n_heads={self.n_heads} does not divide d_model={self.d_model}.")
        if self.d_mlp < 0 or not 0 <= self.dropout < 1:
            raise Error(
                f"d_mlp={self.d_mlp}, dropout={self.dropout}: "
                "expected d_mlp >= 0 and 0 <= dropout < 1."
            )

    @property
    def causal(self):
        """Whether outputs depend on no later input: what language modelling needs, and `step`."""
        return not self.bidirectional


def groups(cfg):
    """Parameters with a learning rate of their own: none"""
    return {}


def shapes(cfg, part):
    """name -> shape of a part's parameters"""
    D = cfg.d_model
    attention = {"W_qkv": (3 * D, D), "b_qkv": (3 * D,), "W_o": (D, D), "b_o": (D,)}
    if part != "block":
        return attention
    return attention | block.mlp_block_shapes(D, cfg.d_mlp or 4 * D)


def _init(cfg, part, rng, dtype):
    """As GPT-2"""
    return block.gpt2_init(shapes(cfg, part), cfg.depth, rng, dtype, last=("W_o", "W_2"))


# Attention alone


def attention_forward(q, k, v, causal=True, lengths=None, block=128):
    """(2), (3).   q, k, v (B, H, L, d), lengths (B,) -> y (B, H, L, d)

    causal: no query sees a later key; lengths: none sees a key at or beyond its sequence's length.
    Error: a length that is not within 1..L.
    """
    xp, (B, H, L, d) = array_module(q), q.shape
    scaled = q * q.dtype.type(1 / math.sqrt(d))
    y = xp.empty((B, L, H, d), dtype=q.dtype).swapaxes(1, 2)  # joins the heads without a copy
    log_total = xp.empty((B, H, L), dtype=q.dtype)
    seen, longest = _keys_seen(q, causal, lengths)
    work = xp.empty(B * H * min(block, L) * longest, dtype=q.dtype)
    for rows, keys in _blocks(L, longest, causal, block):
        S = _products(scaled[:, :, rows], k[:, :, keys], work)
        E, total, log_total[:, :, rows] = _exponentials(S, seen[:, rows])
        y[:, :, rows] = (E @ v[:, :, keys]) / total[..., None]
    return y, (q, k, v, y, log_total, seen, longest, causal, block)


def attention_backward(dy, cache):
    """dy (B, H, L, d) -> dq, dk, dv.   (6), (7)"""
    q, k, v, y, log_total, seen, longest, causal, block = cache
    xp, (B, H, L, d) = array_module(q), q.shape
    scale = q.dtype.type(1 / math.sqrt(d))
    scaled, inner = q * scale, (dy * y).sum(axis=-1)
    dq, dk, dv = (xp.zeros((B, L, H, d), dtype=q.dtype).swapaxes(1, 2) for _ in range(3))
    work = xp.empty((2, B * H * min(block, L) * longest), dtype=q.dtype)
    for rows, keys in _blocks(L, longest, causal, block):
        S = _products(scaled[:, :, rows], k[:, :, keys], work[0])
        dP = _products(dy[:, :, rows], v[:, :, keys], work[1])
        P, dS = _weights(S, dP, log_total[:, :, rows], inner[:, :, rows], seen[:, rows])
        dv[:, :, keys] += P.swapaxes(-1, -2) @ dy[:, :, rows]
        dq[:, :, rows] = (dS @ k[:, :, keys]) * scale
        dk[:, :, keys] += dS.swapaxes(-1, -2) @ scaled[:, :, rows]
    return dq, dk, dv


def _blocks(L, longest, causal, block):
    """The queries of every block, and the keys that any of them sees, as slices"""
    for first in range(0, L, block):
        last = min(L, first + block)
        yield slice(first, last), slice(0, min(last, longest) if causal else longest)


def _keys_seen(q, causal, lengths):
    """-> seen (B or 1, L): query i sees the keys before seen[:, i]; the longest of the lengths"""
    xp, (B, _, L, _) = array_module(q), q.shape
    seen = xp.arange(1, L + 1, dtype="int64")[None]
    if not causal:
        seen = xp.full_like(seen, L)
    if lengths is None:
        return seen, L
    shortest, longest = backend.item(lengths.min()), backend.item(lengths.max())
    if lengths.shape != (B,) or shortest < 1 or longest > L:
        raise Error(f"expected {B} lengths between 1 and {L}, the padded length.")
    return xp.minimum(seen, lengths[:, None]), longest


def _products(a, b, work):
    """a (B, H, n, d), b (B, H, K, d) -> a bᵀ (B, H, n, K), at the beginning of work"""
    shape = (*a.shape[:3], b.shape[2])
    out = work[: math.prod(shape)].reshape(shape)
    return array_module(a).matmul(a, b.swapaxes(-1, -2), out=out)


def _exponentials(S, seen):
    """S (B, H, n, K), seen (B or 1, n) -> E = exp(S - its largest), 0 at masked keys, Σ E and
    log Σ exp S (B, H, n).   S may be lost."""
    if twin := twins("transformer", S):
        return twin.exponentials_in_place(S, seen)
    xp, S = array_module(S), _masked(S, seen)
    largest = S.max(axis=-1)
    E = xp.exp(S - largest[..., None])
    total = E.sum(axis=-1)
    return E, total, largest + xp.log(total)


def _weights(S, dP, log_total, inner, seen):
    """S, dP (B, H, n, K), log_total, inner (B, H, n) -> P, dS of (6).   S, dP may be lost."""
    if twin := twins("transformer", S):
        return twin.weights_in_place(S, dP, log_total, inner, seen)
    P = array_module(S).exp(_masked(S, seen) - log_total[..., None])
    return P, P * (dP - inner[..., None])


def _masked(S, seen):
    """S with -∞ at the keys that a query does not see"""
    xp = array_module(S)
    visible = xp.arange(S.shape[-1]) < seen[:, None, :, None]
    return xp.where(visible, S, S.dtype.type(-math.inf))


# Operator, which is the mixer too


def operator_init(cfg, rng, dtype="float32"):
    """Projections of the attention"""
    return _init(cfg, "operator", rng, dtype)


def operator_forward(params, x, cfg, lengths=None):
    """(1) to (4) without norm and residual.   x (B, L, D), lengths (B,) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)
    qkv, project = nn.linear_forward(x, params["W_qkv"], params["b_qkv"])
    o, attention = attention_forward(*_split(qkv, cfg), cfg.causal, lengths, cfg.block)
    y, out = nn.linear_forward(_join(o), params["W_o"], params["b_o"])
    return y, (cfg, project, attention, out)


def operator_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    cfg, project, attention, out = cache
    xp, (B, L, D) = array_module(dy), dy.shape
    do, dW_o, db_o = nn.linear_backward(dy, out)
    do = do.reshape(B, L, cfg.n_heads, -1).swapaxes(1, 2)
    dqkv = [g.swapaxes(1, 2) for g in attention_backward(do, attention)]
    dqkv = xp.stack(dqkv, axis=2).reshape(B, L, 3 * D)
    dx, dW_qkv, db_qkv = nn.linear_backward(dqkv, project)
    return dx, {"W_qkv": dW_qkv, "b_qkv": db_qkv, "W_o": dW_o, "b_o": db_o}


def _split(qkv, cfg):
    """(B, L, 3D) -> q, k, v (B, H, L, d), views"""
    B, L, _ = qkv.shape
    q, k, v = qkv.reshape(B, L, 3, cfg.n_heads, -1).transpose(2, 0, 3, 1, 4)
    return q, k, v


def _join(o):
    """(B, H, L, d) -> (B, L, D)"""
    B, H, L, d = o.shape
    return o.swapaxes(1, 2).reshape(B, L, H * d)


mixer_init, mixer_backward = operator_init, operator_backward


def mixer_forward(params, x, cfg, rng=None, lengths=None):
    """The operator: dropout is the block's.   x (B, L, D) -> y (B, L, D)"""
    return operator_forward(params, x, cfg, lengths)


# Block


def block_init(cfg, rng, dtype="float32"):
    """Attention, MLP and both norms"""
    return _init(cfg, "block", rng, dtype)


def block_forward(params, x, cfg, rng=None, lengths=None):
    """(1) to (5), each branch with dropout.   x (B, L, D), lengths (B,) -> y (B, L, D)"""
    check_activations(x, cfg.d_model)

    def mixer(params, x, cfg, rng):
        return mixer_forward(params, x, cfg, rng, lengths)

    return block.mlp_block_forward(params, x, cfg, mixer, rng)


def block_backward(dy, cache):
    """dy (B, L, D) -> dx, grads"""
    return block.mlp_block_backward(dy, cache, mixer_backward)


def running_statistics(params, cache):
    """Running moments after a training batch: a layer norm has none"""
    return {}


# Recurrent form


def state(params, cfg, batch):
    """Keys and values (B, H, context, d) of no position yet.   Error: the map is not causal."""
    if not cfg.causal:
        raise Error("bidirectional attention sees all of a sequence: it has no recurrent step.")
    shape, W = (batch, cfg.n_heads, cfg.context, cfg.d_model // cfg.n_heads), params["W_o"]
    xp = array_module(W)
    past = {name: xp.zeros(shape, dtype=W.dtype) for name in ("k", "v")}
    return past | {"position": xp.zeros((), dtype="int64")}


def operator_step(params, x_t, state, cfg):
    """One time step of the operator.   x_t (B, D) -> y_t (B, D), state.   Error: context is full"""
    t = backend.item(state["position"])
    if t >= cfg.context:
        raise Error(f"decoding has room for context={cfg.context} positions, and they are full.")
    qkv, _ = nn.linear_forward(x_t[:, None], params["W_qkv"], params["b_qkv"])
    q, *now = _split(qkv, cfg)
    k, v = (_with_position(state[name], t, new) for name, new in zip("kv", now, strict=True))
    scaled = q * q.dtype.type(1 / math.sqrt(q.shape[-1]))
    S = scaled @ k[:, :, : t + 1].swapaxes(-1, -2)
    E, total, _ = _exponentials(S, array_module(S).full((1, 1), t + 1, dtype="int64"))
    o = (E @ v[:, :, : t + 1]) / total[..., None]
    y, _ = nn.linear_forward(_join(o)[:, 0], params["W_o"], params["b_o"])
    return y, {"k": k, "v": v, "position": state["position"] + 1}


def _with_position(past, t, new):
    """A copy of past (B, H, context, d) with new (B, H, 1, d) at position t"""
    copy = array_module(past).zeros(past.shape, dtype=past.dtype)
    copy[:, :, :t], copy[:, :, t : t + 1] = past[:, :, :t], new
    return copy


def step(params, x_t, state, cfg):
    """One time step of the block.   x_t (B, D) -> y_t (B, D), state"""
    return block.mlp_block_step(params, x_t, state, cfg, operator_step)


# Looking at it


def matrix(params, cfg, x=None, L=None):
    """P of (3) for the operator's input x, for each channel of o that of its head: o = Σ_s P v_s

    x (B, L, D), or its first L positions -> M (B, D, L, L).   Error: no x
    """
    if x is None:
        raise Error("the attention's matrix depends on its input: give x (B, L, D).")
    xp, x = array_module(x), x[:, :L]
    qkv, _ = nn.linear_forward(x, params["W_qkv"], params["b_qkv"])
    q, k, _ = _split(qkv, cfg)
    d = q.shape[-1]
    S = (q @ k.swapaxes(-1, -2)) * q.dtype.type(1 / math.sqrt(d))
    E, total, _ = _exponentials(S, _keys_seen(q, cfg.causal, None)[0])
    return xp.repeat(E / total[..., None], d, axis=1)


def impulse_response(params, cfg, L):
    """Error: attention is no convolution"""
    raise Error("attention is no linear time-invariant map: it has no kernel to show; see matrix.")


def hankel_values(params, cfg):
    """Error: attention is no convolution"""
    raise Error("attention is no linear time-invariant map: it has no Hankel matrix.")


# Names of the published code

_ATTENTION = {
    "W_qkv": "c_attn.weight",
    "b_qkv": "c_attn.bias",
    "W_o": "c_proj.weight",
    "b_o": "c_proj.bias",
}
_NORMS = {f"norm{i}_{kind}": f"ln_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
_MLP = {
    "W_1": "c_fc.weight",
    "b_1": "c_fc.bias",
    "W_2": "c_proj.weight",
    "b_2": "c_proj.bias",
}
PUBLISHED = {
    "operator": _ATTENTION,
    "mixer": _ATTENTION,
    "block": _NORMS | block.within("attn.", _ATTENTION) | block.within("mlp.", _MLP),
}
PUBLISHED_LAYER = {"": "transformer.h.{i}."}  # a block within a network
PUBLISHED_NETWORK = {  # ours -> theirs, outside of the blocks
    "encoder.weight": "transformer.wte.weight",
    "encoder.position": "transformer.wpe.weight",
    "final.norm_weight": "transformer.ln_f.weight",
    "final.norm_bias": "transformer.ln_f.bias",
    "decoder.weight": "lm_head.weight",
}
PUBLISHED_SETTINGS = ("vocab_size", "context_length", "norm_eps", "layout")


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params; every W is transposed there"""
    names = {ours: theirs for ours, theirs in PUBLISHED[part].items() if theirs in tensors}
    return {ours: _transposed(ours, tensors[theirs]) for ours, theirs in names.items()}


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    names = {ours: theirs for ours, theirs in PUBLISHED[part].items() if ours in params}
    return {theirs: _transposed(ours, params[ours]) for ours, theirs in names.items()}


def _transposed(name, x):
    return x.T if name.startswith("W") else x


def config_of(settings, tensors, part):
    """The Config of a case: widths off its published tensors' shapes, the rest from its settings"""
    own = {name: value for name, value in settings.items() if name not in PUBLISHED_SETTINGS}
    own["context"] = settings.get("context_length", own.get("context", Config.context))
    widths = {}
    for name, t in tensors.items():
        if name.endswith("c_attn.weight"):
            widths["d_model"] = t.shape[0]
        elif name.endswith("c_fc.weight"):
            widths["d_mlp"] = t.shape[1]
    return Config(**widths | own)


def network_settings(settings, tensors):
    """The network.Config fields of a case with published settings.   Error: another GPT-2"""
    check_choice("layout", settings["layout"], ("transformers",))
    if settings["norm_eps"] != nn.EPS:
        raise Error(f"norm_eps={settings['norm_eps']}: the norms here have {nn.EPS}.")
    vocabulary = settings["vocab_size"]
    return {
        "n_layers": settings["n_layers"],
        "d_input": vocabulary,
        "d_output": vocabulary,
        "tokens": True,
        "decoder": "lm",
        "tied": True,
        "final_norm": True,
        "positions": settings["context_length"],
    }


# A checkpoint of GPT-2

_OF_GPT2 = {  # what config.json may say, its default first
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


def load_gpt2(path, n_heads=None):
    """GPT-2 as transformers saves it, model.safetensors -> params, network.Config

    The number of heads is n_head of the config.json beside it, without that file n_heads or else
    D/64, which is that of all published sizes.   Error: not GPT-2; a tensor missing or misshapen
    """
    path = Path(path)
    beside = path.with_name("config.json")
    settings = checkpoints.read_settings(beside)
    checkpoints.check_only(settings, _OF_GPT2, beside)
    tensors = _gpt2_tensors(path)
    try:
        numbers = {int(name.split(".")[2]) for name in tensors if name.startswith("transformer.h.")}
        (V, D), (P, _) = (tensors[f"transformer.{n}.weight"].shape for n in ("wte", "wpe"))
        heads = settings.get("n_head", n_heads or max(1, D // 64))
        sizes = {"n_heads": heads, "context_length": P, "depth": len(numbers)}
        layer = config_of(sizes, tensors, "network")
        sizes = {"vocab_size": V, "context_length": P, "n_layers": len(numbers)}
        sizes |= {"norm_eps": settings.get("layer_norm_epsilon", nn.EPS), "layout": "transformers"}
        cfg = network.Config("transformer", layer, **network_settings(sizes, tensors))
    except (KeyError, TypeError, ValueError) as e:
        raise Error(f"{path} is no GPT-2 checkpoint: {e} is missing or has another form.") from e
    own = {"n_layer": cfg.n_layers, "n_embd": D, "vocab_size": V, "n_positions": P}
    for name, size in own.items():
        if settings.get(name, size) != size:
            raise Error(f"{beside}: {name}={settings[name]!r}, but {path} has {size}.")
    _check_gpt2(tensors, cfg, path)
    return network.from_published(tensors, cfg), cfg


def _gpt2_tensors(path):
    """Name -> float32 or float64 array; names with their prefix, without masks and tied head"""
    tensors = {}
    for name, t in files.read_tensors(path)[0].items():
        if not name.endswith((".attn.bias", ".attn.masked_bias")):
            name = "transformer." + name.removeprefix("transformer.")
            tensors[name] = t if t.dtype.name == "float64" else t.astype("float32")
    head = tensors.pop("transformer.lm_head.weight", None)
    tied = tensors.get("transformer.wte.weight")
    if not (head is None or tied is None or array_module(head).array_equal(head, tied)):
        raise Error(f"{path}: lm_head.weight is not the embedding; the head here is tied to it.")
    return tensors


def _check_gpt2(tensors, cfg, path):
    """Error when a tensor is missing, has another shape, or is none of GPT-2's"""
    D, own = cfg.layer.d_model, shapes(cfg.layer, "block")
    expected = {f"transformer.ln_f.{kind}": (D,) for kind in ("weight", "bias")}
    expected |= {"transformer.wte.weight": (cfg.d_input, D)}
    expected |= {"transformer.wpe.weight": (cfg.positions, D)}
    for i in range(cfg.n_layers):
        names = PUBLISHED["block"].items()
        expected |= {f"transformer.h.{i}.{theirs}": own[ours][::-1] for ours, theirs in names}
    checkpoints.check_tensors({name: t.shape for name, t in tensors.items()}, expected, path)
