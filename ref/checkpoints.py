"""Checkpoints of Mamba and Longhorn as others publish them: safetensors and a config.json.

Two layouts, told apart by the names of the tensors:

    original      mamba_ssm, longhorn   backbone.embedding.weight; a tied lm_head.weight beside it
    transformers  MambaForCausalLM      backbone.embeddings.weight; a tied head is not listed

Both keep the vocabulary padded up in the tensors, and so does the network here. Sizes come from the
tensors' shapes; config.json, where there is one, must agree with them, and says what shapes do not:
the activation, the norm's epsilon, whether the head is tied. What the published code can be set to
and this one cannot is refused by name. Numbers come as float32, or as float64 where one of the
tensors is. Pickled files are never read: they run code.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ref import Error, backend, files, network, nn, selective

MODELS = ("mamba", "longhorn")
CONFIG, WHOLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NUMBERS = ("F16", "BF16", "F32", "F64")
_EMBEDDINGS = tuple(selective.EMBEDDING.values())
_HEAD = "lm_head.weight"

# What config.json may say of things that the models here have in one form only; ssm_cfg is a part
# of the original one
_ONLY = {
    "original": {
        "rms_norm": (True,),
        "norm_epsilon": (nn.EPS,),
        "d_intermediate": (0,),
        "attn_layer_idx": ([],),
        "bidirectional": (False,),
    },
    "ssm_cfg": {"layer": ("Mamba1",), "bias": (False,), "conv_bias": (True,)},
    "transformers": {
        "model_type": ("mamba",),
        "hidden_act": ("silu", "swish"),
        "layer_norm_epsilon": (nn.EPS,),
        "use_bias": (False,),
        "use_conv_bias": (True,),
    },
}
_SIZES = {  # theirs -> ours; "inner" is E
    "original": {"d_model": "d_model", "n_layer": "n_layers"},
    "ssm_cfg": {name: name for name in ("d_state", "d_conv", "expand", "dt_rank")},
    "transformers": {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "state_size": "d_state",
        "conv_kernel": "d_conv",
        "expand": "expand",
        "intermediate_size": "inner",
        "time_step_rank": "dt_rank",
    },
}
_STEPS = {  # of initialisation, kept so that they can be written back
    "ssm_cfg": {"dt_min": "dt_min", "dt_max": "dt_max"},
    "transformers": {"time_step_min": "dt_min", "time_step_max": "dt_max"},
}


def load(path, model=None):
    """A checkpoint's folder, file or index -> params (host), network.Config

    model: mamba or longhorn; without it the names of the tensors decide.   Error: another model; a
    setting that has no counterpart here; a tensor missing, unknown or misshapen; a file cut,
    missing or pickled
    """
    found = inspect(path, model)
    params = {n: np.empty(s, found.dtype) for n, s in shapes(found.cfg).items()}
    slots = network.to_published(params, found.cfg)  # views: what is written there is in params
    for file, names in found.files.items():
        with files.opened(file) as tensors:
            for name in names & slots.keys():
                slots[name][...] = tensors.get_tensor(name)
    return params, found.cfg


def save(folder, params, cfg, layout=None, shard_bytes=0):
    """Write a network into a folder: tensors and config.json, in a layout (without it cfg's own);
    shard_bytes > 0: in several files of at most that size each, but for larger tensors.

    Error: a network that has no published form, or the folder holds a checkpoint already
    """
    folder, layout = Path(folder), layout or getattr(cfg.layer, "layout", None)
    _check_published(cfg, layout)
    for there in (folder / name for name in (CONFIG, INDEX, WHOLE)):
        if there.exists():
            raise Error(f"{there} is there already; give a folder that holds no checkpoint.")
    cfg = dataclasses.replace(cfg, layer=dataclasses.replace(cfg.layer, layout=layout))
    params = {name: backend.to_host(p) for name, p in params.items()}
    tensors = network.to_published(params, cfg)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        files.write_tensors(folder / WHOLE, tensors, {"format": "pt"})
    else:
        weight_map = {}
        for i, names in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors"
            own = {n: tensors[n] for n in names}
            files.write_tensors(folder / name, own, {"format": "pt"})
            weight_map |= dict.fromkeys(names, name)
        size = sum(t.nbytes for t in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    dtype = params["encoder.weight"].dtype.name
    _write_json(folder / CONFIG, _SETTINGS[layout](cfg, dtype))


@dataclass(frozen=True)
class Found:
    """What a checkpoint holds, without its numbers."""

    cfg: network.Config
    files: dict  # path -> set of the names that are read from it
    dtype: str  # float32 or float64: what load gives
    stored: str  # the tensors' own types
    bytes: int

    def __str__(self):
        layer, V = self.cfg.layer, self.cfg.d_input
        E, R = selective.sizes(layer)
        many = "" if len(self.files) == 1 else "s"
        number = sum(math.prod(shape) for shape in shapes(self.cfg).values())
        return (
            f"{self.cfg.model}, layout {layer.layout}, {self.cfg.n_layers} layers\n"
            f"    D {layer.d_model}, E {E}, N {layer.d_state}, K {layer.d_conv}, R {R}; "
            f"vocabulary {V}, head {'tied' if self.cfg.tied else 'of its own'}\n"
            f"    {number:,} parameters; {self.bytes:,} bytes of {self.stored} "
            f"in {len(self.files)} file{many}"
        )


def inspect(path, model=None):
    """-> Found, from the files' headers; of the numbers only a head is compared with the embedding

    Error: as load
    """
    path = Path(path)
    headers = _headers(path)  # name -> (file, shape, number type)
    beside = (path if path.is_dir() else path.parent) / CONFIG
    settings = _settings(beside)
    model, embedding = _model_of(headers, model, path)
    sizes, rows = dict(_given(settings, beside)), _rows(headers[embedding][1], path)
    if "vocab_size" in settings:
        _check_vocabulary(settings, rows, beside)
    steps = {name: sizes.pop(name) for name in ("dt_min", "dt_max") if name in sizes}
    cfg = _config(model, headers, _tied(headers, embedding, settings, beside), steps, path)
    _check_sizes(sizes, cfg, beside)
    expected = network.to_published(_placeholders(shapes(cfg)), cfg)
    found = {name: shape for name, (_, shape, _) in headers.items()}
    if cfg.tied and _HEAD in found:  # in either layout a tied head may be listed or not
        del found[_HEAD]
    expected = {n: t.shape for n, t in expected.items() if not (cfg.tied and n == _HEAD)}
    check_tensors(found, expected, path)
    by_file = {}
    for name, (file, _, _) in headers.items():
        by_file.setdefault(file, set()).add(name)
    types = sorted({number for _, _, number in headers.values()})
    total = sum(math.prod(s) * _width(number) for _, s, number in headers.values())
    dtype = "float64" if "F64" in types else "float32"
    return Found(cfg, by_file, dtype, ", ".join(types), total)


def shapes(cfg):
    """Our name -> shape of every parameter of a language model of Mamba's or Longhorn's layers"""
    layer, D, V = cfg.layer, cfg.layer.d_model, cfg.d_input
    (E, R), N, K = selective.sizes(layer), layer.d_state, layer.d_conv
    of_block = {
        "norm_weight": (D,),
        "W_in": (2 * E, D),
        "conv_weight": (E, 1, K),
        "conv_bias": (E,),
        "W_x": (R + 2 * N, E),
        "W_dt": (E, R),
        "dt_bias": (E,),
        "A_log": (E, N),
        "D": (E,),
        "W_out": (D, E),
    }
    has = network.model_module(cfg.model).PUBLISHED["block"]
    own = {"encoder.weight": (V, D)} | ({} if cfg.tied else {"decoder.weight": (cfg.d_output, D)})
    blocks = {f"blocks.{n}": (cfg.n_layers, *s) for n, s in of_block.items() if n in has}
    return own | blocks | {"final.norm_weight": (D,)}


# Files


def read_settings(path):
    """The object in a config.json, {} without the file.   Error: something else is in it"""
    settings = files.read_json(path) if path.exists() else {}
    if not isinstance(settings, dict):
        raise Error(f"{path} holds no settings.")
    return settings


def check_tensors(found, expected, path):
    """Error when one of the shapes expected {name: shape} is missing or another, or unknown"""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise Error(f"{path}: {name} {expected[name]} is missing.")
        if found[name] != (wanted := expected.get(name)):
            has = f"{name} has the shape {found[name]}"
            raise Error(f"{path}: {has}; expected {wanted or 'no tensor of that name'}.")


def check_only(settings, allowed, path):
    """Error when one of the settings has a value other than those allowed {name: values}"""
    for name, known in allowed.items():
        if settings.get(name, known[0]) not in known:
            raise Error(f"{path}: {name}={settings[name]!r}, but the model here is {known[0]!r}.")


def _headers(path):
    """name -> (file, shape, number type) of all tensors"""
    if path.is_dir():
        path = _main_file(path)
    if path.suffix in _PICKLED:
        raise Error(_pickled(path))
    if path.suffix != ".json":
        return _header(path)
    weight_map = read_settings(path).get("weight_map") if path.exists() else None
    texts = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not texts or not weight_map:
        raise Error(f"{path} is no index: it needs weight_map, the file of each tensor.")
    headers = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".."):
            raise Error(f"{path} names {shard!r}: a shard must lie in the folder of its index.")
        own, named = _header(path.parent / shard), {n for n in weight_map if weight_map[n] == shard}
        if lacking := sorted(named - own.keys()):
            raise Error(f"{path} says that {lacking[0]} is in {shard}, and it is not.")
        if unnamed := sorted(own.keys() - named):
            raise Error(f"{path.parent / shard} holds {unnamed[0]}, but by the index it does not.")
        headers |= own
    return headers


def _main_file(folder):
    """The file of a folder that says where the tensors are.   Error: there is none"""
    for name in (WHOLE, INDEX):
        if (folder / name).exists():
            return folder / name
    alone = sorted(folder.glob("*.safetensors"))
    if len(alone) == 1:
        return alone[0]
    if pickled := sorted(p for p in folder.iterdir() if p.suffix in _PICKLED):
        raise Error(_pickled(pickled[0]))
    raise Error(f"{folder} holds no checkpoint: neither {WHOLE} nor {INDEX}.")


def _pickled(path):
    convert = (
        "import sys, torch; from safetensors.torch import save_file; "
        "t = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({n: x.clone() for n, x in t.items()}, sys.argv[2])"
    )
    return (
        f"{path} is a pickle, which is never loaded: it can run any code. Where torch is installed "
        f'and the file is trusted, convert it: python -c "{convert}" {path.name} {WHOLE}'
    )


def _header(path):
    with files.opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        header = {n: (path, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    for name, (_, _, number) in header.items():
        if number not in _NUMBERS:
            raise Error(f"{path}: {name} is of type {number}; expected {', '.join(_NUMBERS)}.")
    return header


def _width(number):
    return int("".join(filter(str.isdigit, number))) // 8


def _shards(tensors, shard_bytes):
    """Names in groups of at most shard_bytes; one group for 0"""
    groups, size = [[]], 0
    for name, t in tensors.items():
        if shard_bytes and groups[-1] and size + t.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += t.nbytes
    return groups


def _write_json(path, settings):
    files.write_atomically(path, (json.dumps(settings, indent=2) + "\n").encode())


# What it says, and whether it fits


def _settings(path):
    """config.json with ssm_cfg checked to be one.   Error: what it says has no counterpart here"""
    settings = read_settings(path)
    if not isinstance(settings.get("ssm_cfg") or {}, dict):
        raise Error(f"{path}: ssm_cfg={settings['ssm_cfg']!r} holds no settings.")
    for kind, own in _parts(settings):
        check_only(own, _ONLY[kind], path)
    return settings


def _parts(settings):
    """Which vocabulary config.json speaks: (kind, its settings)"""
    if "d_model" in settings:
        return [("original", settings), ("ssm_cfg", settings.get("ssm_cfg") or {})]
    return [("transformers", settings)]


def _given(settings, path):
    """Yields (our name, number) of what config.json says on sizes and step sizes"""
    for kind, own in _parts(settings):
        for theirs, ours in (_SIZES[kind] | _STEPS.get(kind, {})).items():
            value = own.get(theirs, "auto")
            if value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise Error(f"{path}: {theirs}={value!r}; expected a number.")
            yield ours, value


def _model_of(headers, model, path):
    """mamba or longhorn, and the name of the embedding.   Error: neither, or not `model`"""
    embedding = next((name for name in _EMBEDDINGS if name in headers), None)
    layers = [name for name in headers if name.startswith("backbone.layers.")]
    is_longhorn = any(name.endswith(".mixer.dt_head.weight") for name in layers)
    if embedding is None or not layers:
        needs = f"{' or '.join(_EMBEDDINGS)} and backbone.layers.*"
        raise Error(f"{path} is no checkpoint of Mamba or Longhorn: expected {needs}.")
    found = "longhorn" if is_longhorn else "mamba"
    if model is not None and found != model:
        raise Error(f"{path} is a checkpoint of {found}, not of {model}.")
    return found, embedding


def _rows(shape, path):
    if len(shape) != 2 or 0 in shape:
        raise Error(f"{path}: the embedding has the shape {shape}; expected (vocabulary, width).")
    return shape[0]


def _check_vocabulary(settings, rows, path):
    """Error when the embedding has other rows than vocab_size, padded where the layout pads"""
    usual = 8 if "d_model" in settings else 1
    size, multiple = settings["vocab_size"], settings.get("pad_vocab_size_multiple", usual)
    if not all(isinstance(n, int) and n > 0 for n in (size, multiple)):
        raise Error(f"{path}: vocab_size={size!r}, padded to a multiple of {multiple!r}.")
    if rows != -(-size // multiple) * multiple:
        padded = "" if multiple == 1 else f", padded to a multiple of {multiple}"
        raise Error(f"{path}: vocab_size={size}{padded}, but the embedding has {rows} rows.")


def _tied(headers, embedding, settings, path):
    """Whether the head is the embedding.   Error: it should be, but differs; or it is missing"""
    said = settings.get("tie_embeddings", settings.get("tie_word_embeddings"))
    if _HEAD not in headers:
        if said is False:
            raise Error(f"{path}: the head is not tied to the embedding, but there is no {_HEAD}.")
        return True
    if said is False:
        return False
    arrays = []
    for name in (embedding, _HEAD):
        with files.opened(headers[name][0]) as file:
            arrays.append(file.get_tensor(name))
    same = np.array_equal(*arrays)
    if not same and settings:
        raise Error(f"{path}: the head is tied to the embedding, but {_HEAD} is not {embedding}.")
    return same


def _config(model, headers, tied, steps, path):
    """The network.Config that the shapes give"""
    module, like = network.model_module(model), _placeholders({n: h[1] for n, h in headers.items()})
    try:
        for name, t in like.items():
            if name.endswith("in_proj.weight") and t.shape[0] % (2 * t.shape[1]):
                E, D = t.shape[0] / 2, t.shape[1]
                raise Error(f"{path}: {name} has an inner width of {E:g}, no multiple of {D}.")
        numbers = {n.split(".")[2] for n in like if n.startswith("backbone.layers.")}
        own = steps if model == "mamba" else {}  # Longhorn's β has no such range
        layer = module.config_of(own | {"depth": len(numbers)}, like, "network")
        settings = module.network_settings({"tie_embeddings": tied}, like)
        return network.Config(model, layer, **settings)
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise Error(f"{path} is no checkpoint of {model}: {e} is missing or misshapen.") from e


def _check_sizes(sizes, cfg, path):
    """Error when config.json says another size than the tensors have"""
    E, R = selective.sizes(cfg.layer)
    has = dataclasses.asdict(cfg.layer) | {"n_layers": cfg.n_layers, "inner": E, "dt_rank": R}
    for name, size in sizes.items():
        if size != has[name]:
            raise Error(f"{path}: {name} is {size}, but the tensors have {has[name]}.")


def _placeholders(shapes):
    """Arrays of these shapes that take no memory"""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


# Writing


def _check_published(cfg, layout):
    """Error when a network is not what the published code can hold"""
    if cfg.model not in MODELS:
        raise Error(f"{cfg.model} has no published layout here; expected {' or '.join(MODELS)}.")
    if layout not in _SETTINGS:
        raise Error(f"layout={layout!r} is not known; expected one of: {', '.join(_SETTINGS)}.")
    if cfg.model == "longhorn" and layout == "transformers":
        raise Error("transformers has no Longhorn: layout 'original'.")
    if getattr(cfg.layer, "update", "diagonal") != "diagonal":
        raise Error(f"update={cfg.layer.update!r} has no published form.")
    language = cfg.decoder == "lm" and cfg.tokens and cfg.final_norm and not cfg.positions
    if not language or cfg.d_input != cfg.d_output or (cfg.decoder_bias and not cfg.tied):
        raise Error(
            "a published checkpoint is a language model: decoder 'lm' without a bias, tokens in "
            "and out of one vocabulary, a final norm, no learned positions."
        )


def _original_settings(cfg, dtype):
    """What MambaLMHeadModel.from_pretrained takes, without names that older versions lack"""
    layer, (_, R) = cfg.layer, selective.sizes(cfg.layer)
    ssm = {name: getattr(layer, name) for name in ("d_state", "d_conv", "expand")}
    ssm |= {name: getattr(layer, name) for name in ("dt_min", "dt_max") if hasattr(layer, name)}
    return {
        "d_model": layer.d_model,
        "n_layer": cfg.n_layers,
        "vocab_size": cfg.d_input,
        "ssm_cfg": ssm | {"dt_rank": R},
        "rms_norm": True,
        "residual_in_fp32": dtype == "float32",
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1 if cfg.d_input % 8 else 8,
        "tie_embeddings": cfg.tied,
    }


def _transformers_settings(cfg, dtype):
    """What MambaForCausalLM.from_pretrained takes"""
    layer, (E, R) = cfg.layer, selective.sizes(cfg.layer)
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": cfg.d_input,
        "hidden_size": layer.d_model,
        "num_hidden_layers": cfg.n_layers,
        "state_size": layer.d_state,
        "conv_kernel": layer.d_conv,
        "expand": layer.expand,
        "intermediate_size": E,
        "time_step_rank": R,
        "time_step_min": layer.dt_min,
        "time_step_max": layer.dt_max,
        "layer_norm_epsilon": nn.EPS,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": dtype == "float32",
        "tie_word_embeddings": cfg.tied,
        "torch_dtype": dtype,
    }


_SETTINGS = {"original": _original_settings, "transformers": _transformers_settings}
