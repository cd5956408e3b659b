"""TNN's parameters and settings under the names of the published code, tnn-pytorch.

    ours              shape               theirs                              shape there
    W_p, b_p          (r, 1), (r,)        rpe.pos_proj.*
    W_r, b_r          (n, r, r), (n, r)   rpe.layers.{i}.2.*                  one for each layer
    W_t, b_t          (E, r), (E,)        rpe.out.2.*
    gamma             (E,)                gamma                               (heads, 1, E / heads)
    W_u, W_v, W_o     (E, D), .., (D, E)  u_proj.*, v_proj.*, o.*
    W_1, W_2, W_3     (G, D), .., (D, G)  l1.*, l2.*, l3.*

In a mixer the operator is toep, in a block the mixer is token_mixer and the GLU feature_mixer.
Of a whole language model there are no published names: those are ours.
"""

from ref import Error, block
from ref.backend import array_module, check_choice

KINDS = (("W", "weight"), ("b", "bias"))
OF_LAYERS = {"W_r": "rpe.layers.{i}.2.weight", "b_r": "rpe.layers.{i}.2.bias"}
OPERATOR = OF_LAYERS | {
    f"{ours}_{name}": f"rpe.{theirs}.{kind}"
    for name, theirs in (("p", "pos_proj"), ("t", "out.2"))
    for ours, kind in KINDS
}
OPERATOR["gamma"] = "gamma"
MIXER = block.within("toep.", OPERATOR) | {
    f"{ours}_{name}": f"{theirs}.{kind}"
    for name, theirs in (("u", "u_proj"), ("v", "v_proj"), ("o", "o"))
    for ours, kind in KINDS
}
GLU = {f"{ours}_{i}": f"l{i}.{kind}" for i in (1, 2, 3) for ours, kind in KINDS}
PARTS = {
    "operator": OPERATOR,
    "mixer": MIXER,
    "block": block.within("token_mixer.", MIXER) | block.within("feature_mixer.", GLU),
}
LAYER = {"": "layers.{i}."}  # a block within a network
NETWORK = {"encoder.weight": "embed_tokens.weight", "decoder.weight": "lm_head.weight"}
RENAMED = {"act": "rpe_act", "h": "num_heads"}
CHOICES = dict.fromkeys(("norm", "norm_type"), ("simplermsnorm", "simple"))
CHOICES |= dict.fromkeys(("gtu_act", "glu_act", "act_fun"), ("silu",))
FIXED = {"bias": True, "resi_param": False, "use_norm": False, "normalize": False}
OF_SHAPES = ("dim", "embed_dim", "layers", "rpe_embedding", "d1", "d2")  # which the tensors say
LENGTHS = ("n", "max_l")  # which change nothing
SETTINGS = (*RENAMED, *CHOICES, *FIXED, *OF_SHAPES, *LENGTHS, "causal")


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params"""
    names = PARTS[part]
    params = block.from_published(tensors, names)
    for ours in OF_LAYERS:
        layers = [names[ours].format(i=i) for i in range(cfg.rpe_layers)]
        if layers and layers[0] in tensors:
            own = [tensors[name] for name in layers]
            params[ours] = array_module(own[0]).stack(own)
    return params | ({"gamma": params["gamma"].reshape(-1)} if "gamma" in params else {})


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    names, whole = PARTS[part], {n: p for n, p in params.items() if n not in OF_LAYERS}
    if "gamma" in whole:
        whole["gamma"] = whole["gamma"].reshape(cfg.num_heads, 1, -1)
    tensors = block.to_published(whole, names)
    for ours in OF_LAYERS:
        tensors |= {names[ours].format(i=i): p for i, p in enumerate(params.get(ours, ()))}
    return tensors


def config_fields(settings, tensors):
    """A Config's fields: sizes off published tensors' shapes, the rest from a case's settings.
    Error: a setting of the published code under which its map is not the one here"""
    for name in CHOICES.keys() & settings.keys():
        check_choice(name, settings[name], CHOICES[name])
    for name in FIXED.keys() & settings.keys():
        if settings[name] is not FIXED[name]:
            raise Error(
                f"{name}={settings[name]!r}: the layer here is the published one with "
                f"{name}={FIXED[name]}."
            )
    own = {name: value for name, value in settings.items() if name not in SETTINGS}
    own |= {ours: settings[name] for name, ours in RENAMED.items() if name in settings}
    if "causal" in settings:
        own["bidirectional"] = not settings["causal"]
    sizes, rpes = {}, {name.partition("rpe.")[0] for name in tensors if "rpe." in name}
    for name, t in tensors.items():
        if name.endswith("rpe.out.2.weight"):
            E, own["rpe_dim"] = t.shape
            sizes = {"d_model": E, "expand_ratio": 1.0} | sizes
        elif name.endswith("u_proj.weight"):
            sizes = {"d_model": t.shape[1], "expand_ratio": (t.shape[0] + 0.5) / t.shape[1]}
        elif name.endswith("feature_mixer.l1.weight"):
            own["glu_dim"] = len(t)
        elif name.endswith("gamma"):
            own["num_heads"] = len(t)
    if rpes:
        layers = sum("rpe.layers." in name and name.endswith("2.weight") for name in tensors)
        own["rpe_layers"] = layers // len(rpes)
    return own | sizes
