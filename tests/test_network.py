"""Encoder, stack, decoder: gradients are in test_hope; here lengths, batches, names, and bad
input."""

import numpy as np
import pytest
from conftest import error

from ref import Error, hope, network, transformer


def make(
    rng, tokens=True, decoder="mean", tied=False, final_norm=False, n_layers=2, more=None, **layer
):
    cfg = network.Config(
        "hope",
        hope.Config(**dict(d_model=6, d_state=8) | layer),
        **more or {},
        n_layers=n_layers,
        d_input=9,
        d_output=9 if tied else 4,
        tokens=tokens,
        decoder=decoder,
        tied=tied,
        final_norm=final_norm,
    )
    return cfg, network.init(cfg, rng, "float64")


def test_pooling_looks_at_a_sequence_s_own_length():
    rng = np.random.default_rng(0)
    x, lengths = rng.integers(0, 9, (2, 12)), np.array([5, 12])
    for decoder in ("mean", "last"):
        cfg, params = make(rng, decoder=decoder, conv="causal")
        y, _ = network.forward(params, x, cfg, lengths)
        alone, _ = network.forward(params, x[:1, :5], cfg)
        assert error(y[0], alone[0]) < 1e-12
        other = x.copy()
        other[0, 5:] = 0
        assert error(network.forward(params, other, cfg, lengths)[0], y) < 1e-12


def test_pooling_from_a_position_on():
    rng = np.random.default_rng(0)
    cfg, params = make(rng, more={"pool_from": 4}, conv="identity")
    x, lengths = rng.integers(0, 9, (2, 12)), np.array([7, 12])
    y, _ = network.forward(params, x, cfg, lengths)
    for changed, same in ((np.s_[:, :4], True), (np.s_[:, 4:7], False), (np.s_[0, 7:], True)):
        other = x.copy()
        other[changed] = (other[changed] + 1) % 9
        moved = error(network.forward(params, other, cfg, lengths)[0], y)
        assert (moved == 0) == same
    with pytest.raises(Error, match="between 5 and 12"):
        network.forward(params, x, cfg, np.array([4, 12]))


def test_two_documents_are_matched():
    """Rows i and B + i, each pooled alone: the literal features, through the same layers"""
    rng = np.random.default_rng(0)
    cfg, params = make(rng, decoder="match", conv="causal")
    x, lengths = rng.integers(0, 9, (6, 11)), np.array([5, 11, 7, 9, 3, 11])
    y, _ = network.forward(params, x, cfg, lengths)
    assert y.shape == (3, 4)
    pooled, own = [], network.Config("hope", cfg.layer, 2, 9, 6)
    same = params | {"decoder.weight": np.eye(6), "decoder.bias": np.zeros(6)}
    for row, length in zip(x, lengths, strict=True):
        pooled.append(network.forward(same, row[None, :length], own)[0][0])
    for i in range(3):
        p1, p2 = pooled[i], pooled[3 + i]
        features = np.concatenate([p1, p2, p1 * p2, p1 - p2])
        hidden = np.maximum(params["match.weight"] @ features + params["match.bias"], 0)
        expected = params["decoder.weight"] @ hidden + params["decoder.bias"]
        assert error(y[i], expected) < 1e-12
    with pytest.raises(Error, match="two documents"):
        network.forward(params, x[:5], cfg)


def test_learned_positions():
    rng = np.random.default_rng(0)
    cfg, params = make(rng, more={"positions": 8}, conv="identity")
    assert abs(params["encoder.position"].std() / 0.02 - 1) < 0.3
    x = np.full((1, 8), 3)
    y, _ = network.forward(params, x, cfg)
    z = params["encoder.weight"][3] + params["encoder.position"]
    same = params | {"encoder.weight": z}
    plain, _ = network.forward(same, np.arange(8)[None], make(rng, conv="identity")[0])
    assert error(y, plain) < 1e-12
    with pytest.raises(Error, match="9 long, but the network has 8 positions"):
        network.forward(params, np.zeros((1, 9), int), cfg)


def test_padding_is_hidden_from_models_that_look_everywhere():
    rng = np.random.default_rng(0)
    layer = transformer.Config(d_model=6, n_heads=2, bidirectional=True, block=4)
    cfg = network.Config("transformer", layer, 2, 9, 4, final_norm=True, positions=12)
    params = network.init(cfg, rng, "float64")
    x, lengths = rng.integers(0, 9, (2, 12)), np.array([5, 12])
    y, _ = network.forward(params, x, cfg, lengths)
    assert error(network.forward(params, x[:1, :5], cfg)[0][0], y[0]) < 1e-12
    other = x.copy()
    other[0, 5:] = 0
    assert error(network.forward(params, other, cfg, lengths)[0], y) < 1e-12


def test_a_batch_is_its_samples():
    rng = np.random.default_rng(0)
    cfg, params = make(rng, bidirectional=True, norm="batch")
    x = rng.integers(0, 9, (5, 8))
    y, _ = network.forward(params, x, cfg)
    for i in range(5):
        assert error(network.forward(params, x[i : i + 1], cfg)[0], y[i : i + 1]) < 1e-12


def test_a_language_model_is_causal_and_decodes_step_by_step():
    rng = np.random.default_rng(0)
    cfg, params = make(rng, decoder="lm", tied=True, conv="causal", prenorm=True, final_norm=False)
    x = rng.integers(0, 9, (2, 10))
    y, _ = network.forward(params, x, cfg)
    assert y.shape == (2, 10, 9)
    changed = x.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 9
    assert error(network.forward(params, changed, cfg)[0][:, :6], y[:, :6]) < 1e-12
    layers = [network.layer_params(params, i) for i in range(2)]
    states = [hope.state(p, cfg.layer, 2) for p in layers]
    for t in range(10):
        z = params["encoder.weight"][x[:, t]]
        for i, p in enumerate(layers):
            z, states[i] = hope.step(p, z, states[i], cfg.layer)
        assert error(z @ params["encoder.weight"].T, y[:, t]) < 1e-10


def test_published_names_both_ways():
    rng = np.random.default_rng(0)
    for tokens in (True, False):
        cfg, params = make(rng, tokens=tokens, bidirectional=True, norm="batch")
        tensors = network.to_published(params, cfg)
        assert tensors["s4_layers.1.kernel.H"].shape == (12, 4, 2)
        assert tensors["s4_layers.0.output_linear.0.weight"].shape == (12, 6, 1)
        assert "norms.1.running_var" in tensors
        back = network.from_published(tensors, cfg)
        assert back.keys() == params.keys()
        assert all((back[n] == params[n]).all() for n in params)


def test_groups():
    rng = np.random.default_rng(0)
    cfg, params = make(rng, norm="batch")
    groups = network.groups(params, cfg)
    assert groups["blocks.H"] == "ssm" and groups["blocks.log_dt"] == "dt"
    assert groups["blocks.norm_mean"] == "frozen" and groups["blocks.W"] == "main"
    cfg, params = make(rng, train_markov=False)
    assert network.groups(params, cfg)["blocks.H"] == "frozen"


def test_bad_input_gets_its_sentence():
    rng = np.random.default_rng(0)
    cfg, params = make(rng)
    x = np.zeros((2, 5), int)
    for wrong, lengths, sentence in (
        (x + 9, None, "token 9 is outside the vocabulary of 9"),
        (x - 1, None, "token -1 is outside"),
        (x[0], None, "expected \\(B, L\\) tokens"),
        (x[:, :0], None, "at least 1"),
        (x, np.array([0, 5]), "lengths must lie between 1 and 5"),
        (x, np.array([5, 6]), "lengths must lie between 1 and 5"),
        (x, np.array([5]), "expected \\(2,\\) integers"),
        (x, np.array([5.0, 5.0]), "expected \\(2,\\) integers"),
        (x + 0.5, None, "tokens have dtype float64"),
    ):
        with pytest.raises(Error, match=sentence):
            network.forward(params, wrong, cfg, lengths)
    for settings in (dict(n_layers=0), dict(decoder="lm"), dict(decoder="middle"), dict(tied=True)):
        with pytest.raises(Error):
            make(rng, **settings)
    for wrong in (dict(pool_from=2, decoder="last"), dict(positions=-1)):
        with pytest.raises(Error):
            make(rng, decoder=wrong.pop("decoder", "mean"), more=wrong)
    with pytest.raises(Error, match="expected the Config of ref"):
        network.Config("s4", cfg.layer, 2, 9, 4)
    with pytest.raises(Error, match="model='hop' is not known"):
        network.model_module("hop")
