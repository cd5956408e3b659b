"""Other people's packages as callables: PyTorch's layers and optimisers, transformers, mamba.py and
tnn-pytorch, each for one comparison of ref/peers.py.

A layer takes tensors in the order of the pair of ref.nn; a part of a model takes what
ref.cases.verify_callable gives, p with tensors under published names and x (B, L, D). Others
compare by themselves and return {"out.*" or "grad.*": (theirs, ours)}.
"""

import contextlib
import math

import numpy as np

from ref import nn, optim
from ref.peer_twins import Lazy, functional, torch

B, L, D, N, LAYERS, VOCABULARY, HEADS = 2, 19, 12, 5, 2, 17, 3
transformers = Lazy("transformers")
gpt2 = Lazy("transformers.models.gpt2.modeling_gpt2")
hf_mamba = Lazy("transformers.models.mamba.modeling_mamba")
mambapy = Lazy("mambapy.mamba")
tnn_pytorch = Lazy("tnn_pytorch")


def called(module, p, *args, **kwargs):
    """A module's result with the tensors p in the place of its own, which differ in precision"""
    return torch.func.functional_call(module.to(next(iter(p.values())).dtype), p, args, kwargs)


# PyTorch's layers


def batch_norm(x, weight, bias):
    """x (B, L, D), by the batch's moments"""
    y = functional.batch_norm(x.flatten(0, 1), None, None, weight, bias, training=True)
    return y.unflatten(0, x.shape[:2])


def running_moments():
    """BatchNorm1d's running moments after three batches"""
    rng, momentum = np.random.default_rng(0), 0.1
    theirs = torch.nn.BatchNorm1d(D, momentum=momentum, dtype=torch.float64)
    mean, var = np.zeros(D), np.ones(D)
    for _ in range(3):
        x = rng.standard_normal((B, L, D))
        _, cache = nn.batch_norm_forward(x, np.ones(D), np.zeros(D), mean, var, True)
        mean, var = nn.batch_norm_running(mean, var, cache, momentum)
        theirs(torch.tensor(x).flatten(0, 1))
    return {"out.mean": (theirs.running_mean, mean), "out.var": (theirs.running_var, var)}


def conv1d(x, w, b):
    """x (B, L, D), depthwise and causal"""
    K, length = w.shape[2], x.shape[1]
    return functional.conv1d(x.mT, w, b, padding=K - 1, groups=len(w))[:, :, :length].mT


def long_conv1d(x, k):
    """The long convolution, directly.   x (B, L, D), k (D, L)"""
    return conv1d(x, k.flip(1)[:, None], None)


def gru(x, W, U, b, c, h0):
    """torch.nn.GRU's outputs, (B, L, H)"""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    own = torch.nn.GRU(W.shape[1], U.shape[1], batch_first=True)
    return called(own, dict(zip(names, (W, U, b, c), strict=True)), x, h0[None])[0]


def lstm_cell(x, state, W, U, b, c):
    """torch.nn.LSTMCell.   -> state (2, B, H)"""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    own = torch.nn.LSTMCell(W.shape[1], U.shape[1])
    return torch.stack(called(own, dict(zip(names, (W, U, b, c), strict=True)), x, tuple(state)))


def adamw():
    """Parameters after five steps of torch.optim.AdamW with decay and a schedule, one of them with
    a rate of 0"""
    rng = np.random.default_rng(0)
    params = {name: rng.standard_normal((3, D)) for name in "abc"}
    groups = {"a": optim.Group(0.1, 0.3), "b": optim.Group(0.02), "c": optim.Group(0.0)}
    own = {name: torch.tensor(p, requires_grad=True) for name, p in params.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [own[n]], "lr": g.lr, "weight_decay": g.weight_decay}
            for n, g in groups.items()
        ]
    )
    moments = optim.adamw_init(params)
    for step in range(1, 6):
        scale = optim.warmup_cosine(step, 6, 2)
        grads = {name: rng.standard_normal(p.shape) for name, p in params.items()}
        for group, (name, g) in zip(theirs.param_groups, groups.items(), strict=True):
            group["lr"], own[name].grad = scale * g.lr, torch.tensor(grads[name])
        theirs.step()
        optim.adamw_update(params, grads, moments, step, groups, scale)
    return {f"out.{n}": (own[n].detach(), p) for n, p in params.items()}


def clipping():
    """torch.nn.utils.clip_grad_norm_: the norm and the gradients"""
    rng = np.random.default_rng(0)
    grads = {name: rng.standard_normal((3, D)) for name in "ab"}
    own = [torch.zeros(3, D, dtype=torch.float64, requires_grad=True) for _ in grads]
    for p, g in zip(own, grads.values(), strict=True):
        p.grad = torch.tensor(g)
    theirs = torch.nn.utils.clip_grad_norm_(own, 0.7)
    norm = optim.gradient_norm(grads)
    clipped = optim.clip(grads, norm, 0.7).values()
    found = {f"out.{i}": (p.grad, g) for i, (p, g) in enumerate(zip(own, clipped, strict=True))}
    return {"out.norm": (theirs, norm)} | found


def attention(p, x, causal=True):
    """The Transformer's mixer with scaled_dot_product_attention"""
    q, k, v = (x @ p["c_attn.weight"] + p["c_attn.bias"]).unflatten(2, (3, HEADS, -1)).unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).flatten(2) @ p["c_proj.weight"] + p["c_proj.bias"]


def encoder_layer(p, x, causal=True):
    """The Transformer's block as torch.nn.TransformerEncoderLayer"""
    matrices = {"linear1": "mlp.c_fc", "linear2": "mlp.c_proj", "self_attn.out_proj": "attn.c_proj"}
    own = {f"{a}.weight": p[f"{b}.weight"].T for a, b in matrices.items()}
    own |= {f"{a}.bias": p[f"{b}.bias"] for a, b in matrices.items()}
    own |= {f"norm{i}.{kind}": p[f"ln_{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")}
    own["self_attn.in_proj_weight"] = p["attn.c_attn.weight"].T
    own["self_attn.in_proj_bias"] = p["attn.c_attn.bias"]
    layer = torch.nn.TransformerEncoderLayer(
        x.shape[2],
        HEADS,
        len(own["linear1.bias"]),
        dropout=0.0,
        activation=lambda a: functional.gelu(a, approximate="tanh"),
        norm_first=True,
        batch_first=True,
    )
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    return called(layer, own, x, src_mask=mask, is_causal=causal)


# transformers, mamba.py and tnn-pytorch


def gpt2_config():
    """GPT-2, small, without dropout"""
    sizes = dict(n_embd=D, n_head=HEADS, n_layer=LAYERS, n_positions=L, vocab_size=VOCABULARY)
    none = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None)
    config = transformers.GPT2Config(**sizes, **none)
    config._attn_implementation = "sdpa"  # a block alone makes its causal mask in this one only
    return config


def gpt2_block(p, x):
    """GPT2Block"""
    y = called(gpt2.GPT2Block(gpt2_config(), layer_idx=0), p, x)
    return y[0] if isinstance(y, tuple) else y


def gpt2_network(p, x, lengths=None):
    """GPT2LMHeadModel"""
    return called(transformers.GPT2LMHeadModel(gpt2_config()), p, x, use_cache=False).logits


def their_mamba_config(p):
    """Of the sizes that the parameters have"""
    R = next(t.shape[1] for n, t in p.items() if n.endswith("dt_proj.weight"))
    sizes = dict(vocab_size=VOCABULARY, hidden_size=D, state_size=N, time_step_rank=R)
    return transformers.MambaConfig(**sizes, num_hidden_layers=LAYERS, use_mambapy=False)


def hf_mamba_block(p, x):
    """MambaBlock of transformers, its plain loop"""
    y = called(hf_mamba.MambaBlock(their_mamba_config(p), layer_idx=0), p, x)
    return y[0] if isinstance(y, tuple) else y


def hf_mamba_network(p, x, lengths=None):
    """MambaForCausalLM"""
    model = transformers.MambaForCausalLM(their_mamba_config(p))
    return called(model, p, x, use_cache=False).logits


def mambapy_block(p, x, pscan=True):
    """ResidualBlock of mamba.py"""
    R = p["mixer.dt_proj.weight"].shape[1]
    own = mambapy.MambaConfig(d_model=D, n_layers=1, dt_rank=R, d_state=N, pscan=pscan)
    return called(mambapy.ResidualBlock(own), p, x)


def mambapy_scan(x, dt, A, B, C, D, z, dt_bias, method="selective_scan"):
    """mamba.py's scan, parallel or in turn"""
    sizes = dict(d_model=x.shape[2], expand_factor=1, d_state=A.shape[1])
    own = mambapy.MambaBlock(mambapy.MambaConfig(**sizes, n_layers=1))
    y = getattr(own, method)(x, functional.softplus(dt + dt_bias), A, B, C, D)
    return y * functional.silu(z)


def mambapy_complex():
    """mamba.py's parallel scan of complex decays against the recurrence, both by autograd"""
    rng = np.random.default_rng(0)
    shape = (B, L, 4, N)
    size, angle = rng.uniform(0.5, 1, shape), rng.uniform(0, 2 * math.pi, shape)
    u, dy = rng.standard_normal((2, *shape, 2)).view("complex128")[..., 0]
    inputs = [torch.tensor(a, requires_grad=True) for a in (size * np.exp(1j * angle), u)]

    def recurrence(a, u):
        h, states = 0, []
        for t in range(L):
            h = a[:, t] * h + u[:, t]
            states.append(h)
        return torch.stack(states, dim=1)

    found = {}
    for i, f in enumerate((Lazy("mambapy.pscan").pscan, recurrence)):
        y = f(*inputs)
        grads = torch.autograd.grad(y, inputs, torch.tensor(dy))
        for name, t in zip(("out.y", "grad.A", "grad.X"), (y, *grads), strict=True):
            found.setdefault(name, [None, None])[i] = t.detach().numpy()
    return found


@contextlib.contextmanager
def float64_default():
    """tnn-pytorch makes its positions in the default precision"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tnn_operator(p, x, causal=True):
    """Tno"""
    with float64_default():
        layers = sum(name.startswith("rpe.layers.") for name in p) // 2
        r = len(p["rpe.pos_proj.bias"])
        own = tnn_pytorch.Tno(h=1, dim=x.shape[2], rpe_dim=r, causal=causal, layers=layers)
        return called(own, p, x[:, None])[:, 0]


def tnn_block(p, x, causal=True):
    """TnnLayer"""
    mixer = {n.removeprefix("token_mixer."): t for n, t in p.items()}
    with float64_default():
        own = tnn_pytorch.TnnLayer(
            dim=x.shape[2],
            num_heads=1,
            rpe_embedding=len(mixer["toep.rpe.pos_proj.bias"]),
            glu_dim=len(p["feature_mixer.l1.bias"]),
            expand_ratio=len(mixer["u_proj.bias"]) // x.shape[2],
            causal=causal,
            rpe_layers=sum(name.startswith("toep.rpe.layers.") for name in mixer) // 2,
        )
        return called(own, p, x)
