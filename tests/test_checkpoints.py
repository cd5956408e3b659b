"""Checkpoints in the published layouts: read and written back bit by bit, every refusal's sentence,
the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import error
from safetensors.numpy import load_file, save_file

from ref import Error, cases, checkpoints, longhorn, mamba, network

ROOT = Path(__file__).parents[1]
V, D, E, N, K, R, LAYERS = 24, 6, 12, 5, 3, 2, 2
EMBEDDING = {"original": "backbone.embedding.weight", "transformers": "backbone.embeddings.weight"}
ORIGINAL = {
    "d_model": D,
    "n_layer": LAYERS,
    "vocab_size": 21,  # padded to 24 in the tensors
    "ssm_cfg": {"d_state": N, "d_conv": K, "dt_rank": R},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}
TRANSFORMERS = {
    "model_type": "mamba",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": E,
    "num_hidden_layers": LAYERS,
    "state_size": N,
    "conv_kernel": K,
    "expand": 2,
    "time_step_rank": R,
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
}
SETTINGS = {"original": ORIGINAL, "transformers": TRANSFORMERS}
EACH_LAYOUT = pytest.mark.parametrize("layout", list(SETTINGS))


def published(layout="original", model="mamba", tied=True, dtype="float32"):
    """Random tensors of a checkpoint"""
    rng, tensors = np.random.default_rng(0), {}
    step = "dt_proj" if model == "mamba" else "dt_head"
    shapes = {EMBEDDING[layout]: (V, D), "backbone.norm_f.weight": (D,)}
    for i in range(LAYERS):
        own = {
            "norm.weight": (D,),
            "mixer.in_proj.weight": (2 * E, D),
            "mixer.conv1d.weight": (E, 1, K),
            "mixer.conv1d.bias": (E,),
            "mixer.x_proj.weight": (R + 2 * N, E),
            f"mixer.{step}.weight": (E, R),
            f"mixer.{step}.bias": (E,),
            "mixer.D": (E,),
            "mixer.out_proj.weight": (D, E),
        }
        if model == "mamba":
            own["mixer.A_log"] = (E, N)
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in own.items()}
    for name, shape in shapes.items():
        tensors[name] = rng.standard_normal(shape).astype(dtype)
    if not tied:
        tensors["lm_head.weight"] = rng.standard_normal((V, D)).astype(dtype)
    elif layout == "original":
        tensors["lm_head.weight"] = tensors[EMBEDDING[layout]].copy()
    return tensors


def put(folder, tensors, settings=None):
    """A checkpoint's folder of one file"""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").unlink(missing_ok=True)
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def put_shards(folder, tensors, parts=3):
    """The same in several files, without a config.json"""
    names, weight_map = list(tensors), {}
    for i in range(parts):
        own = names[i::parts]
        save_file({n: tensors[n] for n in own}, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(own, f"part-{i}.safetensors")
    put_index(folder, weight_map)
    return weight_map


def put_index(folder, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def stored(folder):
    """All tensors of a folder"""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def same(a, b):
    """Names, shapes, number types and bits"""
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert t.shape == b[name].shape and t.dtype == b[name].dtype, name
        assert t.tobytes() == b[name].tobytes(), name


# There and back


@pytest.mark.parametrize(
    "model, layout",
    [("mamba", "original"), ("mamba", "transformers"), ("longhorn", "original")],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shard_bytes", [0, 1000])
def test_what_was_read_is_written_back(tmp_path, model, layout, tied, dtype, shard_bytes):
    tensors = published(layout, model, tied, dtype)
    tie = {"original": "tie_embeddings", "transformers": "tie_word_embeddings"}[layout]
    folder = put(tmp_path / "theirs", tensors, SETTINGS[layout] | {tie: tied})
    params, cfg = checkpoints.load(folder, model)
    assert cfg.model == model and cfg.tied == tied and cfg.d_input == cfg.d_output == V
    assert cfg.final_norm and not cfg.decoder_bias and cfg.decoder == "lm"
    sizes = dict(d_model=D, d_state=N, d_conv=K, expand=2, dt_rank=R, depth=LAYERS, layout=layout)
    assert sizes.items() <= dataclasses.asdict(cfg.layer).items()
    assert {p.dtype.name for p in params.values()} == {dtype}
    assert all(p.flags.c_contiguous and p.flags.writeable for p in params.values())
    same(network.from_published(tensors, cfg), params)
    checkpoints.save(tmp_path / "ours", params, cfg, shard_bytes=shard_bytes)
    same(stored(tmp_path / "ours"), tensors)
    again, cfg_again = checkpoints.load(tmp_path / "ours")
    same(again, params)
    assert cfg_again == cfg
    files = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 0)
    own = {n: t.nbytes for n, t in tensors.items()}
    for path in files if shard_bytes else ():
        held = load_file(path).keys()
        assert len(held) == 1 or sum(own[n] for n in held) <= shard_bytes


@EACH_LAYOUT
def test_the_other_layout_has_the_same_numbers(tmp_path, layout):
    params, cfg = checkpoints.load(put(tmp_path / "a", published(layout)))
    other = next(name for name in SETTINGS if name != layout)
    checkpoints.save(tmp_path / "b", params, cfg, other)
    again, cfg_again = checkpoints.load(tmp_path / "b")
    same(again, params)
    assert cfg_again.layer == dataclasses.replace(cfg.layer, layout=other)
    assert EMBEDDING[other] in stored(tmp_path / "b")


def test_a_folder_its_file_and_its_index_are_the_same(tmp_path):
    tensors = published()
    folder = put(tmp_path / "a", tensors, ORIGINAL)
    params, cfg = checkpoints.load(folder / "model.safetensors")
    (tmp_path / "b").mkdir()
    put_shards(tmp_path / "b", tensors)
    for path in (folder, tmp_path / "b", tmp_path / "b" / "model.safetensors.index.json"):
        again, cfg_again = checkpoints.load(str(path))
        same(again, params)
        assert cfg_again == cfg
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    same(checkpoints.load(folder)[0], params)


@EACH_LAYOUT
@pytest.mark.parametrize("listed", [True, False])
def test_a_tied_head_may_be_listed_or_not(tmp_path, layout, listed):
    tensors = published(layout)
    tensors.pop("lm_head.weight", None)
    if listed:
        tensors["lm_head.weight"] = tensors[EMBEDDING[layout]].copy()
    for settings in (None, SETTINGS[layout]):
        _, cfg = checkpoints.load(put(tmp_path, tensors, settings))
        assert cfg.tied


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_precision_becomes_float32(tmp_path, dtype):
    tensors = {n: t.astype(dtype) for n, t in published("transformers").items()}
    tensors["backbone.layers.0.mixer.D"] = np.arange(E, dtype="float32")  # as published ones have
    params, cfg = checkpoints.load(put(tmp_path, tensors))
    same(params, network.from_published({n: t.astype("f4") for n, t in tensors.items()}, cfg))
    found = checkpoints.inspect(tmp_path)
    assert found.dtype == "float32" and found.bytes == sum(t.nbytes for t in tensors.values())


def test_the_golden_network_of_transformers(tmp_path):
    case = cases.read_case(ROOT / "tests" / "golden" / "mamba_network_a.safetensors")
    tensors = {n[6:]: t for n, t in case.tensors.items() if n.startswith("param.")}
    params, cfg = checkpoints.load(put(tmp_path, tensors), "mamba")
    logits, _ = network.forward(params, case.tensors["in.x"], cfg)
    assert error(logits, case.tensors["out.y"]) < 1e-9


def test_step_sizes_of_initialisation_survive(tmp_path):
    for layout, more in (
        ("original", {"ssm_cfg": ORIGINAL["ssm_cfg"] | {"dt_min": 0.01, "dt_max": 0.2}}),
        ("transformers", {"time_step_min": 0.01, "time_step_max": 0.2}),
    ):
        folder = put(tmp_path / layout, published(layout), SETTINGS[layout] | more)
        params, cfg = checkpoints.load(folder)
        assert (cfg.layer.dt_min, cfg.layer.dt_max) == (0.01, 0.2)
        checkpoints.save(tmp_path / f"{layout}-again", params, cfg)
        assert checkpoints.load(tmp_path / f"{layout}-again")[1] == cfg


def test_save_leaves_no_half_of_a_checkpoint_unnoticed(tmp_path):
    """A sharded one whose writing was cut has no index yet, so that it does not load"""
    params, cfg = checkpoints.load(put(tmp_path / "a", published()))
    checkpoints.save(tmp_path / "b", params, cfg, shard_bytes=1000)
    (tmp_path / "b" / "model.safetensors.index.json").unlink()
    with pytest.raises(Error, match="holds no checkpoint"):
        checkpoints.load(tmp_path / "b")


# Refusals


def without(name):
    return lambda tensors: tensors.pop(name)


def setting(name, tensor):
    return lambda tensors: tensors.__setitem__(name, tensor)


WRONG_TENSORS = [
    (without("backbone.layers.1.mixer.A_log"), r"layers.1.mixer.A_log \(12, 5\) is missing"),
    (without("backbone.norm_f.weight"), r"norm_f.weight \(6,\) is missing"),
    (without("backbone.embeddings.weight"), "no checkpoint of Mamba or Longhorn"),
    (setting("backbone.layers.0.extra", np.zeros(3, "f4")), r"expected no tensor of that name"),
    (setting("backbone.layers.0.mixer.in_proj.bias", np.zeros(3, "f4")), "no tensor of that name"),
    (setting("backbone.layers.7.norm.weight", np.zeros(6, "f4")), r"layers.2.* is missing"),
    (setting("backbone.layers.one.norm.weight", np.zeros(6, "f4")), "is missing"),
    (setting("backbone.layers.0.mixer.D", np.zeros(13, "f4")), r"D has the shape \(13,\); .*12"),
    (setting("backbone.layers.0.mixer.D", np.zeros((), "f4")), r"D has the shape \(\); .*12"),
    (
        setting("backbone.embeddings.weight", np.zeros((24, 7), "f4")),
        r"\(24, 7\); expected \(24, 6",
    ),
    (setting("backbone.embeddings.weight", np.zeros(24, "f4")), r"expected \(vocabulary, width\)"),
    (setting("backbone.embeddings.weight", np.zeros((0, 6), "f4")), r"expected \(vocabulary, w"),
    (
        setting("backbone.layers.1.mixer.in_proj.weight", np.zeros((18, 6), "f4")),
        "9, no multiple of",
    ),
    (setting("backbone.layers.1.mixer.in_proj.weight", np.zeros(6, "f4")), "misshapen"),
    (setting("backbone.layers.1.mixer.in_proj.weight", np.zeros((0, 0), "f4")), "misshapen"),
    (setting("backbone.layers.0.mixer.D", np.zeros(12, "i4")), "D is of type I32; expected F16"),
    (setting("lm_head.weight", np.zeros((23, 6), "f4")), r"lm_head.weight has the shape \(23, 6\)"),
    (lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers" in n], "no checkpoint of"),
]


@pytest.mark.parametrize(
    "change, sentence", WRONG_TENSORS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_tensors(tmp_path, change, sentence):
    tensors = published("transformers")
    change(tensors)
    with pytest.raises(Error, match=sentence):
        checkpoints.load(put(tmp_path, tensors))


WRONG_SETTINGS = [
    ("transformers", {"use_bias": True}, "use_bias=True, but the model here is False"),
    ("transformers", {"use_conv_bias": False}, "use_conv_bias=False"),
    ("transformers", {"hidden_act": "gelu"}, "hidden_act='gelu', but the model here is 'silu'"),
    ("transformers", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
    ("transformers", {"model_type": "falcon_mamba"}, "model_type='falcon_mamba'"),
    ("transformers", {"model_type": "mamba2"}, "model_type='mamba2'"),
    ("transformers", {"hidden_size": 7}, "d_model is 7, but the tensors have 6"),
    ("transformers", {"num_hidden_layers": 3}, "n_layers is 3, but the tensors have 2"),
    ("transformers", {"state_size": "5"}, "state_size='5'; expected a number"),
    ("transformers", {"intermediate_size": 18}, "inner is 18, but the tensors have 12"),
    ("transformers", {"vocab_size": 23}, "vocab_size=23, but the embedding has 24 rows"),
    ("transformers", {"vocab_size": "24"}, "vocab_size='24'"),
    ("transformers", {"tie_word_embeddings": False}, "not tied .* there is no lm_head.weight"),
    ("original", {"rms_norm": False}, "rms_norm=False"),
    ("original", {"norm_epsilon": 1e-6}, "norm_epsilon=1e-06"),
    ("original", {"d_intermediate": 8}, "d_intermediate=8"),
    ("original", {"attn_layer_idx": [1]}, r"attn_layer_idx=\[1\]"),
    ("original", {"bidirectional": True}, "bidirectional=True"),
    (
        "original",
        {"ssm_cfg": {"layer": "Mamba2"}},
        "layer='Mamba2', but the model here is 'Mamba1'",
    ),
    ("original", {"ssm_cfg": {"bias": True}}, "bias=True"),
    ("original", {"ssm_cfg": {"conv_bias": False}}, "conv_bias=False"),
    ("original", {"ssm_cfg": {"d_state": 16}}, "d_state is 16, but the tensors have 5"),
    ("original", {"ssm_cfg": {"expand": 1.5}}, "expand is 1.5, but the tensors have 2"),
    ("original", {"ssm_cfg": [1]}, r"ssm_cfg=\[1\] holds no settings"),
    ("original", {"vocab_size": 15}, "vocab_size=15, padded to a multiple of 8, .* 24 rows"),
    ("original", {"pad_vocab_size_multiple": 0}, "vocab_size=21, padded to a multiple of 0"),
    ("original", {"n_layer": True}, "n_layer=True; expected a number"),
    ("original", {"ssm_cfg": {"dt_min": 2, "dt_max": 1}}, "expected 0 < dt_min <= dt_max"),
]


@pytest.mark.parametrize("layout, change, sentence", WRONG_SETTINGS, ids=str)
def test_settings_that_have_no_counterpart(tmp_path, layout, change, sentence):
    folder = put(tmp_path, published(layout), SETTINGS[layout])
    checkpoints.load(folder)
    with pytest.raises(Error, match=sentence):
        checkpoints.load(put(tmp_path, published(layout), SETTINGS[layout] | change))


def test_settings_that_are_none(tmp_path):
    put(tmp_path, published())
    for text, sentence in (("[]", "holds no settings"), ("{", "not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Error, match=sentence):
            checkpoints.load(tmp_path)
    for settings in ({}, {"architectures": ["MambaForCausalLM"]}, ORIGINAL | {"ssm_cfg": None}):
        checkpoints.load(put(tmp_path, published(), settings))  # shapes say the rest


def test_a_head_that_should_be_tied_and_differs(tmp_path):
    tensors = published() | {"lm_head.weight": np.zeros((V, D), "f4")}
    with pytest.raises(Error, match=r"lm_head.weight is not backbone.embedding.weight"):
        checkpoints.load(put(tmp_path, tensors, ORIGINAL))
    assert not checkpoints.load(put(tmp_path, tensors))[1].tied  # nobody says that it should


def test_the_other_model(tmp_path):
    folder = put(tmp_path, published(model="longhorn"))
    assert checkpoints.load(folder)[1].model == "longhorn"
    with pytest.raises(Error, match="a checkpoint of longhorn, not of mamba"):
        checkpoints.load(folder, "mamba")


def test_files_that_are_not_there_or_not_whole(tmp_path):
    for name in ("none", "none.safetensors", "none.index.json"):
        with pytest.raises(Error, match="none"):
            checkpoints.load(tmp_path / name)
    with pytest.raises(Error, match=r"holds no checkpoint: neither model.safetensors nor"):
        checkpoints.load(tmp_path)
    path = put(tmp_path / "a", published()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Error, match="not a whole safetensors file"):
        checkpoints.load(tmp_path / "a")


def test_pickles_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    for path in (tmp_path, tmp_path / "pytorch_model.bin", tmp_path / "model.pt"):
        with pytest.raises(Error, match=r"is a pickle, which is never loaded.*convert it: python"):
            checkpoints.load(path)


def test_the_conversion_that_the_sentence_names_works(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to convert")
    tensors = {n: torch.tensor(t) for n, t in published().items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]  # one memory, as it is saved
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(Error) as e:
        checkpoints.load(tmp_path)
    command = str(e.value).partition("convert it: ")[2].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert checkpoints.load(tmp_path)[1].tied


def test_shards(tmp_path):
    tensors = published("transformers")
    weight_map = put_shards(tmp_path, tensors)
    checkpoints.load(tmp_path)
    some = "backbone.norm_f.weight"
    for change, sentence in (
        ({some: "none.safetensors"}, "There is no file .*none.safetensors"),
        ({some: "../part-0.safetensors"}, "a shard must lie in the folder of its index"),
        ({some: str(tmp_path / "part-0.safetensors")}, "must lie in the folder"),
        ({some: ".."}, "must lie in the folder"),
        (
            {"other": "part-0.safetensors"},
            "says that other is in part-0.safetensors, and it is not",
        ),
        ({some: "part-0.safetensors"}, f"says that {some} is in part-0"),
        ({some: 3}, "is no index: it needs weight_map"),
    ):
        put_index(tmp_path, weight_map | change)
        with pytest.raises(Error, match=sentence):
            checkpoints.load(tmp_path)
    put_index(tmp_path, {n: f for n, f in weight_map.items() if n != some})
    with pytest.raises(Error, match=f"holds {some}, but by the index it does not"):
        checkpoints.load(tmp_path)
    for weight_map in ({}, None, []):
        put_index(tmp_path, weight_map)
        with pytest.raises(Error, match="is no index"):
            checkpoints.load(tmp_path)


def test_networks_without_a_published_form(tmp_path):
    params, cfg = checkpoints.load(put(tmp_path / "a", published("transformers")))
    layer = longhorn.Config(d_model=D, d_state=N)
    of_longhorn = dataclasses.replace(cfg, model="longhorn", layer=layer)
    exact = dataclasses.replace(layer, update="exact")
    for other, layout, sentence in (
        (of_longhorn, "transformers", "transformers has no Longhorn"),
        (dataclasses.replace(of_longhorn, layer=exact), None, "update='exact' has no published"),
        (dataclasses.replace(cfg, tied=False, decoder_bias=True), None, "without a bias"),
        (dataclasses.replace(cfg, final_norm=False), None, "a final norm"),
        (dataclasses.replace(cfg, tied=False, d_output=3), None, "one vocabulary"),
        (dataclasses.replace(cfg, decoder="mean", tied=False), None, "decoder 'lm'"),
        (dataclasses.replace(cfg, positions=8), None, "no learned positions"),
        (cfg, "gguf", "layout='gguf' is not known"),
    ):
        with pytest.raises(Error, match=sentence):
            checkpoints.save(tmp_path / "b", params, other, layout)
    assert not (tmp_path / "b").exists()
    with pytest.raises(Error, match="is there already"):
        checkpoints.save(tmp_path / "a", params, cfg)


def test_shapes_are_those_of_a_new_network():
    for module in (mamba, longhorn):
        name = module.__name__.removeprefix("ref.")
        layer = module.Config(d_model=10, d_state=3, d_conv=2, expand=3)
        for tied in (True, False):
            own = dict(d_input=7, d_output=7, decoder="lm", tied=tied, decoder_bias=False)
            cfg = network.Config(name, layer, 3, **own, final_norm=True)
            params = network.init(cfg, np.random.default_rng(0))
            assert checkpoints.shapes(cfg) == {n: p.shape for n, p in params.items()}


# The command


def ref(*arguments, expect=0):
    command = [sys.executable, "-m", "ref", "checkpoint", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == expect, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr


def test_command(tmp_path):
    folder = put(tmp_path / "a", published("transformers"), TRANSFORMERS)
    out = ref(folder)
    assert "mamba, layout transformers, 2 layers" in out
    assert "D 6, E 12, N 5, K 3, R 2; vocabulary 24, head tied" in out
    tensors = published("transformers")
    assert f"{sum(t.size for t in tensors.values()):,} parameters" in out
    assert f"{sum(t.nbytes for t in tensors.values()):,} bytes of F32 in 1 file\n" in out
    ref(folder, "-o", tmp_path / "b", "--layout", "original", "--shard-mib", 1)
    same(stored(tmp_path / "b"), published())
    assert "is there already" in ref(folder, "-o", tmp_path / "b", expect=1)
    assert "-o FOLDER" in ref(folder, "--layout", "original", expect=2)
    out = ref(tmp_path / "none", expect=1)
    assert out.startswith("Error: ") and out.count("\n") == 1
    assert "Example: python -m ref checkpoint" in " ".join(ref("--help").split())
    ref(expect=2)
