"""The recurrent form of long convolutions within whole models, and `python -m ref convert`."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from test_generate import TEXT, small_network, trained

import train
from ref import Error, backend, convert, etsc, generate, network, s4, ssm

LONG = ("hope", "s4", "s4d", "hyena", "tnn")  # the models with a long convolution
NATIVE = ("hope", "s4", "s4d")  # those with a recurrent form of their own
L = 40  # small_network's l_max


def beyond(params, cfg, n):
    """The same network where it is to run n positions at once: S4's C~ made for that length"""
    if cfg.model != "s4" or n <= cfg.layer.l_max:
        return params, cfg
    C = []
    for i in range(cfg.n_layers):
        own = network.layer_params(params, i)
        own = own | {"C": s4.output_matrix(own, cfg.layer.l_max)}
        C.append(s4.truncated(own, n))
    return params | {"blocks.C": np.stack(C)}, replace(cfg, layer=replace(cfg.layer, l_max=n))


def decoded(params, cfg, x, state):
    logits = []
    for t in range(x.shape[1]):
        y, state = network.step(params, x[:, t], state, cfg)
        logits.append(y)
    return np.stack(logits, axis=1)


@pytest.mark.parametrize("horizon", [1, 2, 37, L, 8 * L])
@pytest.mark.parametrize("model", LONG)
def test_exact_form_is_the_convolution_up_to_the_horizon(model, horizon):
    params, cfg = small_network(model)
    if model == "hyena" and horizon > L:
        with pytest.raises(Error, match="l_max"):
            convert.systems(params, cfg, horizon=horizon)
        return
    systems = convert.systems(params, cfg, horizon=horizon)
    x = np.random.default_rng(0).integers(0, 11, (3, horizon))
    longer, own = beyond(params, cfg, horizon)
    expected, _ = network.forward(longer, x, own)
    logits = decoded(params, cfg, x, network.state(params, cfg, 3, systems))
    assert np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("model", LONG)
def test_beyond_the_horizon_is_refused(model):
    params, cfg = small_network(model)
    systems = convert.systems(params, cfg, horizon=5)
    state = network.state(params, cfg, 1, systems)
    assert convert.horizon(state) == 5
    for _ in range(5):
        _, state = network.step(params, np.array([1]), state, cfg)
    with pytest.raises(Error, match="holds for 5 positions"):
        network.step(params, np.array([1]), state, cfg)
    with pytest.raises(Error, match="Ask for at most 3 tokens"):
        generate.sample(params, cfg, [1, 2, 3], 4, systems=systems)
    assert len(list(generate.sample(params, cfg, [1, 2, 3], 3, systems=systems))) == 3


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("model", network.MODELS)
def test_prefill_is_so_many_steps(model, converted):
    params, cfg = small_network(model)
    systems = convert.systems(params, cfg, horizon=L) if converted and model in LONG else None
    if converted and systems is None:
        with pytest.raises(Error, match="no long convolution"):
            convert.systems(params, cfg, horizon=9)
        return
    x = np.random.default_rng(0).integers(0, 11, (3, 33))
    expected = decoded(params, cfg, x, network.state(params, cfg, 3, systems))
    for first in (1, 2, 31):
        state = network.state(params, cfg, 3, systems)
        y, state = network.prefill(params, x[:, :first], cfg, state)
        logits = np.concatenate([y[:, None], decoded(params, cfg, x[:, first:], state)], axis=1)
        difference = np.abs(logits - expected[:, first - 1 :]).max()
        assert difference < 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("model", LONG)
def test_reduced_form_comes_closer_with_its_rank(model):
    params, cfg = small_network(model)
    x = np.random.default_rng(0).integers(0, 11, (2, L))
    expected, _ = network.forward(params, x, cfg)
    errors = []
    for rank in (2, 8, L // 2 - 1):
        systems = convert.systems(params, cfg, "hankel", horizon=L, rank=rank)
        assert all(np.abs(s.lam).max() < 1 for filters in systems for s in filters)
        logits = decoded(params, cfg, x, network.state(params, cfg, 2, systems))
        errors.append(np.abs(logits - expected).max() / np.abs(expected).max())
    assert errors[1] < errors[0] and errors[2] < max(errors[1], 1e-3)


@pytest.mark.parametrize("model", ["s4", "s4d"])
def test_reduced_form_finds_the_few_states_that_there_are(model):
    params, cfg = small_network(model)
    x = np.random.default_rng(0).integers(0, 11, (2, L))
    expected, _ = network.forward(params, x, cfg)
    few = {"horizon": L, "rank": cfg.layer.d_state, "hankel": "rectangle"}
    systems = convert.systems(params, cfg, "hankel", **few)
    logits = decoded(params, cfg, x, network.state(params, cfg, 2, systems))
    assert np.abs(logits - expected).max() < 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("model", LONG)
def test_the_text_is_that_of_the_convolution(model):
    params, cfg = small_network(model)
    systems, texts = convert.systems(params, cfg, horizon=L), set()
    for temperature in (0, 1):

        def text(temperature=temperature, **form):
            rng = np.random.default_rng(0)
            return list(generate.sample(params, cfg, [1, 2, 3], 30, temperature, rng=rng, **form))

        expected = text(recompute=True)
        assert text() == text(systems=systems) == expected
        texts |= {*expected}
    assert len(texts) > 5


@pytest.mark.parametrize("model", LONG)
def test_float32_stays(model):
    params, cfg = small_network(model, "float32")
    systems = convert.systems(params, cfg, horizon=L)
    x = np.random.default_rng(0).integers(0, 11, (3, L))
    expected, _ = network.forward(params, x, cfg)
    state = network.state(params, cfg, 3, systems)
    y, state = network.prefill(params, x[:, :7], cfg, state)
    assert y.dtype == np.float32
    logits = decoded(params, cfg, x[:, 7:], state)
    assert logits.dtype == np.float32
    assert np.abs(logits - expected[:, 7:]).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("model", LONG)
def test_kernels_are_the_impulse_response(model):
    params, cfg = small_network(model)
    module, own = network.model_module(model), network.layer_params(params, 1)
    k = module.kernels(own, cfg.layer, 23)
    assert k.ndim == 3 and k.shape[2] == 23
    if model in NATIVE:
        x = np.zeros((1, 23, 6))
        x[:, 0] = 1
        y, _ = module.operator_forward(own, x, cfg.layer)
        skip = np.zeros((6, 23))
        skip[:, 0] = own["D"]
        assert np.abs(k[0] + skip - y[0].T).max() < 1e-12


def test_what_has_no_recurrent_form_is_refused():
    for model, settings, said in (
        ("s4d", {"bidirectional": True}, "sees all of a sequence"),
        ("hope", {"conv": "circular"}, "sees all of a sequence|no causal kernel"),
        ("tnn", {"bidirectional": True}, "sees all of a sequence"),
    ):
        module = network.model_module(model)
        layer = module.Config(d_model=4, **settings)
        cfg = network.Config(model, layer, 1, 11, 11)
        params = network.init(cfg, np.random.default_rng(0))
        with pytest.raises(Error, match=said):
            convert.systems(params, cfg, horizon=8)
    params, cfg = small_network("s4d")
    with pytest.raises(Error, match="needs a horizon"):
        convert.systems(params, cfg)


# The commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of each model with a long convolution, and one of Mamba"""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "input.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "draw_curves", lambda out: None)
        for model in (*LONG, "mamba"):
            trained(folder, model)
    return folder


@pytest.mark.parametrize("model", LONG)
def test_convert_prints_what_it_costs(ref, folder, model, tmp_path):
    out, _ = ref("convert", folder / model, "-o", tmp_path / "systems.safetensors")
    lines = out.splitlines()
    assert "states" in lines[2] and "64" in lines[3].split() and lines[3].split()[0] == "0.0"
    [said] = [line for line in lines if line.startswith("logits of 64 random tokens")]
    assert float(said.split("at most ")[1].split()[0]) < 1e-5
    assert lines[-1].endswith(" tokens a second")
    with safe_open(tmp_path / "systems.safetensors", "numpy") as f:
        head = json.loads(f.metadata()["systems"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert head["method"] == "exact" and set(head["horizon"].values()) == {64}
    system = etsc.System(
        *(ssm.as_complex(tensors[f"1.0.{n}"]) for n in ("lam", "b")), tensors["1.0.d"], 64, "exact"
    )
    params, cfg, _ = generate.load(folder / model)
    expected = network.model_module(model).kernels(network.layer_params(params, 1), cfg.layer, 64)
    k = etsc.coefficients(system, 64)
    assert np.abs(k - expected[0]).max() < 1e-5 * np.abs(expected[0]).max()


def test_convert_reduces(ref, folder):
    out, _ = ref(
        "convert",
        folder / "tnn",
        "--method",
        "hankel",
        "--rank",
        6,
        "--horizon",
        100,
        *("--hankel", "triangle"),
    )
    row = out.splitlines()[3].split()
    assert row[2] == "100" and int(row[3]) <= 6 and float(row[5]) <= float(row[6])
    one, _ = ref("convert", folder / "s4d", "--method", "hankel", "--tol", "0.5")
    assert float(one.splitlines()[3].split()[4]) <= 0.5


def test_in_float64(ref, folder):
    out, _ = ref("convert", folder / "tnn", "--dtype", "float64")
    [said] = [line for line in out.splitlines() if line.startswith("logits of 64 random tokens")]
    assert float(said.split("at most ")[1].split()[0]) < 1e-11 and said.endswith("(float64)")
    text = "generate", folder / "mamba", "--tokens", 9, "--temperature", 0, "--dtype", "float64"
    assert len(ref(*text)[0]) == 10


@pytest.mark.parametrize("model", LONG)
def test_generate_by_every_method(ref, folder, model):
    start = "generate", folder / model, "--prompt", "to be", "--tokens", 40, "--temperature", 0
    text, _ = ref(*start, "--method", "convolution")
    assert len(text) == 5 + 40 + 1
    assert ref(*start)[0] == ref(*start, "--method", "exact")[0] == text
    reduced, _ = ref(*start, "--method", "hankel", "--rank", 20)
    assert len(reduced) == len(text)


def test_wrong_usage(ref, folder, tmp_path):
    tnn, hyena = folder / "tnn", folder / "hyena"
    for wrong, code, said in (
        (("convert", folder / "mamba"), 1, "mamba has no long convolution"),
        (("convert", hyena, "--horizon", 65), 1, "l_max"),
        (("convert", tnn, "--rank", 3), 2, "--rank is not for --method exact, but for hankel"),
        (("convert", tnn, "--method", "adam", "--tol", 0.1), 2, "--tol is not for --method adam"),
        (("convert", tnn, "--method", "hankel", "--tol", 0), 2, "not in the range"),
        (("convert", tnn, "--horizon", 0), 2, "not in the range"),
        (("convert", tmp_path), 1, "holds no run"),
        (("generate", hyena, "--tokens", 70), 1, "64 positions. Ask for at most 64 tokens"),
        (("generate", tnn, "--rank", 3), 2, "--rank is not for --method auto, but for hankel"),
        (("generate", tnn, "--horizon", 3), 2, "--horizon is for --method exact or hankel"),
        (
            ("generate", hyena, "--tokens", 70, "--method", "convolution"),
            1,
            "the filters of this hyena have 64 positions. Ask for at most 64 tokens",
        ),
        (("generate", tnn, "--method", "exact", "--horizon", 9), 1, "Ask for at most 9 tokens"),
    ):
        _, err = ref(*wrong, expect=code)
        assert said in err and "Traceback" not in err


@pytest.mark.parametrize("model", [model for model in LONG if model != "hyena"])
def test_beyond_the_training_length(ref, folder, model):
    """64 positions in training: a longer prompt, a longer text, a longer horizon"""
    start = "generate", folder / model, "--prompt", TEXT[:90], "--tokens", 40, "--temperature", 0
    text, _ = ref(*start, "--dtype", "float64", "--method", "convolution")
    for how in ((), ("--method", "exact"), ("--method", "exact", "--horizon", 200)):
        assert ref(*start, "--dtype", "float64", *how)[0] == text
    out, _ = ref("convert", folder / model, "--horizon", 200, "--dtype", "float64")
    [said] = [line for line in out.splitlines() if line.startswith("logits of 200 random tokens")]
    assert float(said.split("at most ")[1].split()[0]) < 1e-9


def test_tnn_goes_on_beyond_its_training_length(ref, folder):
    text, _ = ref("generate", folder / "tnn", "--tokens", 200)
    assert len(text) == 201


@pytest.mark.parametrize(
    "model, own, horizon", [("hyena", {"filter": "gated"}, 17), ("tnn", {"par_type": 2}, 33)]
)
def test_filters_that_depend_on_the_length(model, own, horizon, monkeypatch, tmp_path, capsys):
    """Steps are the map of inputs as long as l_max (gated) or as the horizon; convert says so"""
    params, cfg = small_network(model)
    layer = replace(cfg.layer, **own)
    cfg = replace(cfg, layer=layer)
    params = network.init(cfg, np.random.default_rng(1), "float64")
    longest = L if model == "hyena" else horizon
    x = np.random.default_rng(0).integers(0, 11, (2, longest))
    expected, _ = network.forward(params, x, cfg)
    systems = convert.systems(params, cfg, horizon=horizon)
    logits = decoded(params, cfg, x[:, :horizon], network.state(params, cfg, 2, systems))
    assert np.abs(logits - expected[:, :horizon]).max() < 1e-9 * np.abs(expected).max()
    y, _ = network.prefill(params, x[:, :horizon], cfg, network.state(params, cfg, 2, systems))
    assert np.abs(y - expected[:, horizon - 1]).max() < 1e-9 * np.abs(expected).max()
    monkeypatch.setattr(generate, "load", lambda run, dtype: (params, cfg, ["a"] * 11))
    monkeypatch.setattr(backend, "set_threads", lambda threads: None)
    convert.convert(tmp_path, "exact", horizon, None)
    out = capsys.readouterr().out
    assert f"this is the map of {longest:,} positions" in out
    assert float(out.split("at most ")[1].split()[0]) < 1e-9
