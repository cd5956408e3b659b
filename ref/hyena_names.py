"""Hyena's parameters under the names of the published code.

A prenorm block's are those of safari's language model, and so are the mixer's, which
standalone_hyena.py shares. A bare block's are those of L2T-Hyena's student. A filter has the names
of the code that it comes from, in either block.

    ours              shape         safari                              shape there
    z, t              (L, e), (L,)  filter_fn.pos_emb.z and .t          (1, L, e), (1, L, 1)
    deltas            (F D,)        filter_fn.modulation.deltas         (1, 1, F D)
    F_i, c_i          (W, W), (W,)  filter_fn.implicit_filter.{2i}.*
    freq              (W,)          filter_fn.implicit_filter.1.freq    (1, W), also .3.freq, ...
    B                 (F, D)        filter_fn.bias                      (F D,)
    B of the student  (F, D)        B                                   (F, D, 1)
"""

import re

from ref import Error, block

PARTS = ("operator", "mixer", "block")
SETTINGS = ("vocab_size", "context_length", "short_conv_size", "n_layers", "n_layer")
PROJECTIONS = {  # the first part of the names of W_in and b_in, of the taps, of W_out and b_out
    "prenorm": ("in_proj", "short_filter", "out_proj"),
    "bare": ("proj_input.linear", "proj_input.conv", "proj_output"),
}
BLOCK = {
    "W_1": "mlp.fc1.weight",
    "b_1": "mlp.fc1.bias",
    "W_2": "mlp.fc2.weight",
    "b_2": "mlp.fc2.bias",
} | {f"norm{i}_{kind}": f"norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
GATED = {
    "h": "filter.h_basis",
    "W_g": "filter.gate.gate_proj.weight",
    "b_g": "filter.gate.gate_proj.bias",
}
ENDS = {  # of published names, whose shapes say the sizes
    "in_proj.weight": "W_in",
    "proj_input.linear.weight": "W_in",
    "short_filter.weight": "conv_weight",
    "proj_input.conv.weight": "conv_weight",
    "filter.h_basis": "h",
    "pos_emb.z": "z",
    "modulation.deltas": "deltas",
    "implicit_filter.0.weight": "F_0",
    "mlp.fc1.weight": "W_1",
}
LINEAR = re.compile(r"implicit_filter\.(\d+)\.(weight|bias)")
OF_IMPLICIT = re.compile(r"(.*filter_fn\.)(pos_emb|modulation|implicit_filter)\.")


def published_names(cfg, part):
    """{ours: theirs} of a part"""
    names = {"B": "filter_fn.bias" if cfg.block == "prenorm" else "B"}
    names |= GATED if cfg.filter == "gated" else _implicit(cfg.num_inner_mlps + 1)
    if part == "operator":
        return names
    project, conv, out = PROJECTIONS[cfg.block]
    names |= {"W_in": f"{project}.weight", "b_in": f"{project}.bias"}
    names |= {"conv_weight": f"{conv}.weight", "conv_bias": f"{conv}.bias"}
    names |= {"W_out": f"{out}.weight", "b_out": f"{out}.bias"}
    if part == "mixer" or cfg.block == "bare":
        return names
    return block.within("mixer.", names) | BLOCK


def _implicit(n):
    """The names of an implicit filter whose last linear layer, without a bias, is F_n"""
    names = {"z": "pos_emb.z", "t": "pos_emb.t", "deltas": "modulation.deltas"}
    names |= {f"F_{i}": f"implicit_filter.{2 * i}.weight" for i in range(n + 1)}
    names |= {f"c_{i}": f"implicit_filter.{2 * i}.bias" for i in range(n)}
    return block.within("filter_fn.", names | {"freq": "implicit_filter.1.freq"})


def published_layer(layer):
    """Where a block's names stand within a network"""
    return {"": "backbone.layers.{i}." if layer.block == "prenorm" else "layers.{i}."}


def published_network(layer):
    """Ours -> published names, outside of the blocks"""
    return _outside(layer.block == "bare")


def _outside(bare):
    norm = "ln_f" if bare else "backbone.ln_f"
    names = {f"final.norm_{kind}": f"{norm}.{kind}" for kind in ("weight", "bias")}
    if bare:
        names |= {"encoder.weight": "tok_emb.weight", "encoder.position": "pos_emb"}
        return names | {"decoder.weight": "head.weight"}
    names["encoder.weight"] = "backbone.embeddings.word_embeddings.weight"
    return names | {"decoder.weight": "lm_head.weight"}


def published_aliases(cfg, part):
    """{listed: of published_names}: PyTorch lists the one freq under the name of every sine"""
    freq = published_names(cfg, part).get("freq", "")
    sines = range(1, cfg.num_inner_mlps + 1 if freq else 0)
    return {freq.replace(".1.", f".{2 * i + 1}."): freq for i in sines}


def from_published(tensors, cfg, part):
    """The published state dict of `part` -> params.   Error: copies of the one freq differ"""
    tensors = block.untied(tensors, published_aliases(cfg, part))
    params = block.from_published(tensors, published_names(cfg, part))
    return {name: p.reshape(_shape_here(name, p.shape, cfg)) for name, p in params.items()}


def _shape_here(name, shape, cfg):
    if name == "z":
        return shape[1:]
    return {"B": (cfg.filters, cfg.d_model), "t": -1, "deltas": -1, "freq": -1}.get(name, shape)


def to_published(params, cfg, part):
    """params (or their gradients) -> the published names and shapes"""
    there = {name: p.reshape(_shape_there(name, p, cfg)) for name, p in params.items()}
    return block.to_published(there, published_names(cfg, part))


def _shape_there(name, p, cfg):
    if name == "B":
        return (-1,) if cfg.block == "prenorm" else (*p.shape, 1)
    if name == "t":
        return 1, -1, 1
    return (1,) * {"z": 1, "deltas": 2, "freq": 1}.get(name, 0) + p.shape


def config_fields(settings, tensors):
    """A Config's fields: sizes off published tensors' shapes, the rest from a case's settings"""
    own = {name: v for name, v in settings.items() if name not in SETTINGS}
    if "short_conv_size" in settings:
        own["short_filter_order"] = settings["short_conv_size"]
    ends = [(end, t.shape) for name, t in tensors.items() for end in ENDS if name.endswith(end)]
    shape = {ENDS[end]: found for end, found in ends}
    bare = "B" in tensors or any("proj_input." in name for name in tensors)
    found, filters = {"block": "bare" if bare else "prenorm"}, 0
    if "W_in" in shape:
        C, D = shape["W_in"]
        found |= {"d_model": D, "order": C // max(1, D) - 1}
        found |= {"short_filter_order": shape["conv_weight"][2]} if "conv_weight" in shape else {}
    if "h" in shape:
        filters, D, L = shape["h"]
        found |= {"filter": "gated", "d_model": D, "l_max": L}
    elif stems := [match[1] for name in tensors if (match := OF_IMPLICIT.match(name))]:
        for end, ours in ENDS.items():
            if ours in ("z", "deltas", "F_0") and ours not in shape:
                raise Error(f"param.{stems[0]}{end} is missing.")
        (_, L, e), (W, _), channels = shape["z"], shape["F_0"], shape["deltas"][2]
        found |= {"filter": "implicit", "l_max": L, "emb_dim": e, "filter_order": W}
        linears = [match for name in tensors if (match := LINEAR.search(name))]
        last = max(int(match[1]) // 2 + (match[2] == "bias") for match in linears)
        found["num_inner_mlps"] = last - 1  # the last layer has no bias
        if "d_model" not in found:  # of the operator alone
            given = own.get("order", 2) - (own.get("recurrence", "standard") == "standard")
            found["d_model"] = channels // max(1, given)
        filters = channels // max(1, found["d_model"])
    if "order" in found:
        found["recurrence"] = "residual" if filters == found["order"] else "standard"
    if "W_1" in shape:
        found["d_mlp"] = shape["W_1"][0]
    return found | own


def network_settings(settings, tensors):
    """The network.Config fields of a published language model, safari's or the student"""
    bare = "tok_emb.weight" in tensors
    vocabulary = len(tensors[_outside(bare)["encoder.weight"]])
    if settings.get("vocab_size", vocabulary) > vocabulary:
        raise Error(f"vocab_size={settings['vocab_size']}: the embedding has {vocabulary} rows.")
    numbers = {match[1] for name in tensors if (match := re.search(r"layers\.(\d+)\.", name))}
    return {
        "n_layers": settings.get("n_layers", settings.get("n_layer", len(numbers))),
        "d_input": vocabulary,
        "d_output": vocabulary,
        "tokens": True,
        "decoder": "lm",
        "tied": True,
        "final_norm": True,
        "positions": tensors["pos_emb"].shape[1] if bare else 0,
    }
