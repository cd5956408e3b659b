"""Learning to teach, mode "released": published numbers, derivatives, the same with autograd, the
memory, and each oddity of the released code."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import strict
from conftest import error

from ref import Error, backend, cases, gradcheck, l2t, l2t_memory, nn

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("features_released", "features_corrected", "dln", "teacher", "student_loss")
SMALL = {"gru_size": 4, "dln_layers": 3, "dln_size": 5, "teacher_size": 6, "memory_size": 9}
B, S, V = 3, 7, 11


def config(**settings):
    return l2t.Config(**SMALL | {"dln_dropout": 0.0, "teacher_bias": 0.5} | settings)


def networks(cfg, dtype="float64", seed=0):
    """teacher, DLN, moved so far that no gradient drowns in the rounding of the losses"""
    rng = np.random.default_rng(seed)
    made = l2t.teacher_init(cfg, rng, dtype), l2t.dln_init(cfg, rng, dtype)

    def moved(params):
        return {
            n: p + (0.5 * rng.standard_normal(p.shape)).astype(dtype) for n, p in params.items()
        }

    return tuple(map(moved, made))


def student(seed=0, batch=B, dtype="float64"):
    """logits (B, S, V), y (B, S)"""
    rng = np.random.default_rng([seed, 7])
    logits = 1.5 * rng.standard_normal((batch, S, V)).astype(dtype)
    return logits, rng.integers(0, V, (batch, S))


# Published numbers


@pytest.mark.parametrize("part", PARTS)
def test_published_numbers(part):
    case = cases.read_case(GOLDEN / f"l2t_{part}_a.safetensors")
    rows = cases.verify(case)
    claims = {n for n in case.tensors if n.startswith(("out.", "grad."))}
    assert {row.tensor for row in rows} == claims and all(row.allowed == 1e-9 for row in rows)
    assert max(row.error for row in rows) < 1e-12, rows


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("part", ["features", "dln", "teacher", "student-loss"])
def test_what_is_written_verifies(part, precision, tmp_path):
    settings = {"features": "corrected", "n_layers": 3, "layer_size": 5, "clamp": [0.4, 0.6]}
    made = cases.make_case("l2t", part, settings, B=5, L=6, precision=precision, seed=2)
    cases.write_case(tmp_path / "c.safetensors", made)
    rows = cases.verify(cases.read_case(tmp_path / "c.safetensors"))
    assert rows and all(row.ok for row in rows), rows
    for row in rows:
        if precision == "float64" and "residual" not in row.tensor and "norm" not in row.tensor:
            wrong = made.tensors[row.tensor] * 1.001 + 1e-4
            off = dataclasses.replace(made, tensors=made.tensors | {row.tensor: wrong})
            assert [r.tensor for r in cases.verify(off) if not r.ok] == [row.tensor]


OPTIONAL = [
    ("dln", {"granularity": "token"}),
    ("dln", {"granularity": "batch", "clamp": [0, 1]}),
    ("teacher", {"granularity": "token", "teacher_input": "weight+features", "huber_reg": 0.5}),
    ("student-loss", {"regulariser": "logits-sum", "granularity": "token"}),
    ("student-loss", {"regulariser": "entropy", "loss_form": "additive"}),
    ("student-loss", {"regulariser": "weights", "granularity": "token"}),
]


@pytest.mark.parametrize("part, settings", OPTIONAL, ids=str)
def test_cases_of_the_variants(part, settings, tmp_path):
    for precision in ("float64", "float32"):
        made = cases.make_case("l2t", part, settings, B=4, L=5, precision=precision)
        assert made.settings == settings
        cases.write_case(tmp_path / "c.safetensors", made)
        rows = cases.verify(cases.read_case(tmp_path / "c.safetensors"))
        assert rows and all(row.ok for row in rows), rows
        plain = dataclasses.replace(made, settings={"clamp": [0, 1]})
        if part == "student-loss" and "granularity" not in settings:
            assert not all(row.ok for row in cases.verify(plain))


def test_the_penalty_of_all_weights_reaches_the_students_gradients():
    made = cases.make_case("l2t", "student-loss", {"regulariser": "weights"}, B=3, L=4)
    more, tensors = made.tensors, {}
    for name in ("param.layers.0.B", "param.tok_emb.weight"):
        d = np.random.default_rng(0).standard_normal(more[name].shape)
        ends = []
        for k in (1, -1, 2, -2):
            tensors = more | {name: more[name] + k * 1e-4 * d}
            if "tok" in name:
                tensors["param.head.weight"] = tensors[name]
            ends.append(cases.compute(dataclasses.replace(made, tensors=tensors))["out.loss"][0])
        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 12e-4
        assert abs(slope - (more[f"grad.{name}"] * d).sum()) < 1e-9 * max(1, abs(slope))


@pytest.mark.parametrize("settings", [{"recurrence": "standard"}, {"order": 3, "n_layers": 1}])
def test_the_student_of_a_case_is_any_gated_hyena(settings):
    made = cases.make_case("l2t", "student-loss", settings | {"short_conv_size": 2}, B=2, L=5)
    names = [f"grad.param.{n}" for n in ("head.weight", "tok_emb.weight")]
    assert made.tensors[names[0]].shape == (23, 8)
    assert (made.tensors[names[0]] == made.tensors[names[1]]).all()
    once = {n: t for n, t in made.tensors.items() if not n.endswith("head.weight")}
    for tensors, head in ((made.tensors, 1), (once, 0)):
        rows = cases.verify(dataclasses.replace(made, tensors=tensors))
        assert rows and all(row.ok for row in rows)
        assert sum(row.tensor == names[0] for row in rows) == head
    apart = made.tensors | {"param.head.weight": 2 * made.tensors["param.head.weight"]}
    with pytest.raises(Error, match=r"head.weight is tied to tok_emb.weight"):
        cases.verify(dataclasses.replace(made, tensors=apart))


@pytest.mark.parametrize(
    "part, settings, size, sentence",
    [
        ("features", {}, (2, 1), "features of 1 positions and 23 classes"),
        ("features", {"vocab_size": 1}, (2, 4), "features of 4 positions and 1 classes"),
        ("teacher", {}, (1, 4), "a batch of 1 sequence"),
        ("dln", {"dropout": 0.1}, (2, 4), "without dropout"),
        ("dln", {"clamp": 0.5}, (2, 4), "a list of two numbers"),
        ("dln", {"clamp": [0.1, 0.5, 0.9]}, (2, 4), "a list of two numbers"),
        ("dln", {"clamp": [0.6, 0.5]}, (2, 4), "0 <= clamp_low < clamp_high <= 1"),
        ("dln", {"dln_size": 12}, (2, 4), "dln_size: the settings of a case .* name, layer_size"),
        ("dln", {"clamp_low": 0.0}, (2, 4), "clamp_low: the settings of a case .* name, clamp"),
        ("dln", {"layers": 3}, (2, 4), "the setting 'layers' is not one of l2t's"),
        ("student-loss", {"filter": "implicit"}, (2, 4), "filters are gated"),
        ("student-loss", {"context_length": 3}, (2, 4), "3 positions"),
        ("student-loss", {"vocab_size": 0}, (2, 4), "vocab_size=0"),
        ("mixer", {}, (2, 4), "l2t has no part 'mixer'"),
    ],
)
def test_cases_that_cannot_be_written(part, settings, size, sentence):
    with pytest.raises(Error, match=sentence):
        cases.make_case("l2t", part, settings, *size)


@pytest.mark.parametrize(
    "part, name, shape, sentence",
    [
        ("dln", "in.features", (4, 16, 3), r"expected \(B, S, 5\)"),
        ("dln", "dout.weight", (3,), r"out.weight has \(4,\)"),
        ("dln", "param.net.3.weight", (12, 11), r"expected \(12, 12\)"),
        ("teacher", "in.mem_features", (4, 5), r"expected \(B, S, 5\)"),
        ("teacher", "in.mem_ce", (3,), r"in.mem_ce has the shape \(3,\)"),
        ("student_loss", "in.weight", (5,), r"expected \(4,\)"),
        ("features_corrected", "in.logits", (4, 16), r"expected \(B, S, V\)"),
        ("features_corrected", "in.y", (4, 15), r"expected \(B, S, V\)"),
    ],
)
def test_cases_of_wrong_shapes(part, name, shape, sentence):
    case = cases.read_case(GOLDEN / f"l2t_{part}_a.safetensors")
    wrong = np.zeros(shape, case.tensors[name].dtype)
    with pytest.raises(Error, match=sentence):
        cases.verify(dataclasses.replace(case, tensors=case.tensors | {name: wrong}))


# Derivatives


def check(forward, backward, arrays):
    errors = gradcheck.check_pair(forward, backward, arrays)
    assert errors.keys() == arrays.keys() and max(errors.values()) < gradcheck.TOLERANCE, errors


@pytest.mark.parametrize("classes", [2, 3, V])
@pytest.mark.parametrize("standardise", [True, False])
def test_gradients_of_the_features(standardise, classes):
    cfg = config(features="corrected", standardise=standardise)
    logits, y = student()
    logits, y = logits[..., :classes], y % classes
    assert (logits.argmax(axis=2) == y).any() and (logits.argmax(axis=2) != y).any()
    check(
        lambda a: l2t.features_forward(a["z"], y, cfg),
        lambda dF, cache: {"z": l2t.features_backward(dF, cache)},
        {"z": logits},
    )


LIVE = [
    {},
    {"clamp_low": 0.3, "clamp_high": 0.6},
    {"batch_norm": False},
    {"dln_residual": False, "dln_layers": 1},
    {"dln_dropout": 0.3},
    {"granularity": "token", "clamp_low": 0.45, "clamp_high": 0.6, "dln_dropout": 0.3},
    {"granularity": "batch", "dln_dropout": 0.3},
]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("settings", LIVE, ids=str)
def test_gradients_of_the_dynamic_loss_network(settings, live):
    cfg = config(**{"clamp_low": 1e-3, "clamp_high": 1 - 1e-3} | settings)
    _, dln = networks(cfg)
    F = np.random.default_rng(1).standard_normal((6, S, 5))
    clamp = (cfg.clamp_low, cfg.clamp_high) if live else (0, 1)

    def forward(a):
        rng = np.random.default_rng(5) if cfg.dln_dropout else None
        r, raw = l2t.raw_forward(a, a["F"], cfg, live, rng)
        w, squash = l2t.weight_forward(r, clamp)
        if live:
            rng = np.random.default_rng(5) if cfg.dln_dropout else None
            assert (l2t.dln_forward(a, a["F"], cfg, rng)[0] == w).all()
        return w, (raw, squash)

    def backward(dw, cache):
        raw, squash = cache
        dF, grads = l2t.raw_backward(l2t.weight_backward(dw, squash), raw)
        return grads | {"F": dF}

    w, cache = forward(dln | {"F": F})
    cut = np.isin(w, clamp)
    assert w.shape == ((6, S) if cfg.granularity == "token" else (6,))
    assert 0 < cut.sum() < w.size if live and "clamp_low" in settings else not cut.any()
    check(forward, backward, dln | {"F": F})
    grads = backward(np.ones(w.shape), cache)
    untrained = {n for n, g in grads.items() if not g.any()}
    expected = set() if live and cfg.dln_residual else {"W_r", "b_r"}
    expected |= set() if live and cfg.batch_norm else {"norm_weight", "norm_bias"}
    assert untrained == expected


def test_dropout_is_between_the_hidden_layers():
    x = np.random.default_rng(0).standard_normal((6, 4))
    for n, drops in ((1, False), (2, True), (3, True)):
        params = networks(config(dln_layers=n))[1]
        y, _ = l2t.mlp_forward(params, x, n)
        dropped, (layers, _) = l2t.mlp_forward(params, x, n, 0.5, np.random.default_rng(0))
        assert (dropped != y).any() == drops
        assert [mask is not None for _, _, (mask,) in layers] == [True] * (n - 1) + [False]


def test_the_clamp_cuts_value_and_gradient():
    r = np.array([-9.0, -1.0, 0.0, 1.0, 9.0])
    w, cache = l2t.weight_forward(r, (0.05, 0.95))
    assert w[0] == 0.05 and w[-1] == 0.95 and error(w[1:4], 1 / (1 + np.exp(-r[1:4]))) < 1e-15
    dr = l2t.weight_backward(np.ones(5), cache)
    assert dr[0] == dr[-1] == 0 and error(dr[1:4], w[1:4] * (1 - w[1:4])) < 1e-15


def weights(granularity, batch=B, dtype="float64"):
    """w of the student's loss"""
    w = np.random.default_rng(0).uniform(0, 1, (batch, S)).astype(dtype)
    return {"token": w, "sequence": w[:, 0], "batch": np.full(batch, w[0, 0])}[granularity]


@pytest.mark.parametrize("readable", [False, True])
@pytest.mark.parametrize("granularity", ["sequence", "batch", "token"])
@pytest.mark.parametrize("regulariser", l2t.REGULARISERS)
@pytest.mark.parametrize("form", ["convex", "additive"])
def test_gradients_of_the_student_loss(form, regulariser, granularity, readable, plain):
    own = {"loss_form": form, "regulariser": regulariser, "granularity": granularity}
    cfg, (logits, y) = config(reg_strength=0.3, **own), student()
    arrays = {"z": logits, "w": weights(granularity)}
    if regulariser == "weights":
        arrays["square"] = np.array(3.0)

    def forward(a):
        loss, _, cache = l2t.student_loss_forward(a["z"], y, a["w"], cfg, a.get("square"))
        return loss, cache

    def backward(dloss, cache):
        dz, dw, dsquare = l2t.student_loss_backward(dloss, cache)
        if regulariser == "weights":
            return {"z": dz, "w": dw, "square": dsquare}
        assert dsquare == 0.0
        return {"z": dz, "w": dw}

    if readable:
        plain(check, forward, backward, arrays)
    else:
        check(forward, backward, arrays)


def test_gradients_of_the_penalties():
    rng = np.random.default_rng(0)
    for shift in (0.0, 2.0):  # the penalty of the raw mean inactive and active
        r, w, cfg = rng.standard_normal(B) + shift, rng.uniform(0, 1, B), config()
        assert (r.mean() > 1) == (shift > 0)
        for name in ("dln_weight_reg", "saturation_reg", "variance_bonus", "raw_mean_reg", ""):
            every = ("dln_weight_reg", "saturation_reg", "variance_bonus", "raw_mean_reg")
            alone = dataclasses.replace(cfg, **{n: 0.0 for n in every if name and n != name})
            check(
                lambda a, alone=alone: l2t.weight_penalty_forward(a["r"], a["w"], alone),
                lambda d, c: dict(zip("rw", l2t.weight_penalty_backward(d, c), strict=True)),
                {"r": r, "w": w},
            )
    teacher, _ = networks(config())
    check(l2t.norm_penalty_forward, l2t.norm_penalty_backward, teacher)
    _, cache = l2t.norm_penalty_forward({"b": np.zeros(3)})
    assert l2t.norm_penalty_backward(1.0, cache)["b"].tolist() == [0, 0, 0]


TEACHING = [
    {},
    {"teacher_bias": 15.0},
    {"huber_delta": 30.0},
    {"huber_twice": False},
    {"memory_path": "same", "dln_dropout": 0.3},
    {"memory_path": "same", "clamp_low": 0.45, "clamp_high": 0.55, "huber_twice": False},
    {"dln_weight_reg": 0.1, "saturation_reg": 3.0, "variance_bonus": 0.0, "raw_mean_reg": 2.0},
    {"granularity": "token", "memory_path": "same", "clamp_low": 0.4, "clamp_high": 0.6},
    {"granularity": "token", "teacher_input": "weight+features", "huber_reg": 0.3},
    {"granularity": "batch", "memory_path": "same", "huber_reg": 0.0},
    {"teacher_input": "weight+features", "huber_reg": 2.0, "huber_twice": False},
]


def sample(seed=0, batch=5):
    """F (B, S, 5), ce (B,)"""
    rng = np.random.default_rng([seed, 3])
    return rng.standard_normal((batch, S, 5)), 5 + rng.standard_normal(batch)


@pytest.mark.parametrize("mean_over", [False, True])
@pytest.mark.parametrize("settings", TEACHING, ids=str)
def test_gradients_of_the_summed_losses(settings, mean_over):
    cfg = config(**settings)
    (teacher, dln), (F, ce) = networks(cfg), sample()
    if mean_over:  # so that its penalty acts
        dln |= {f"b_{cfg.dln_layers}": np.array([2.5])}

    def forward(a):
        nets = ({n[2:]: p for n, p in a.items() if n[0] == which} for which in "TD")
        rng = np.random.default_rng(5) if cfg.dln_dropout else None
        total, _, cache = l2t.teaching_forward(*nets, F, ce, cfg, rng)
        return total, cache

    def backward(d, cache):
        teacher, dln = l2t.teaching_backward(d, cache)
        return {f"T_{n}": g for n, g in teacher.items()} | {f"D_{n}": g for n, g in dln.items()}

    _, values, _ = l2t.teaching_forward(teacher, dln, F, ce, cfg)
    apart = np.abs(values["prediction"] - values["target"])
    assert np.abs(apart - cfg.huber_delta).min() > 1e-3
    linear = {"teacher_bias": True, "huber_delta": False}
    for name, expected in linear.items():
        if name in settings:
            assert (apart > cfg.huber_delta).all() == expected == (apart > cfg.huber_delta).any()
    arrays = {f"T_{n}": p for n, p in teacher.items()} | {f"D_{n}": p for n, p in dln.items()}
    check(forward, backward, arrays)


# The same with autograd


def torch_step(torch, teacher, dln, logits, y, F_memory, ce_memory, cfg):
    """l + J_T + J_D of modules of PyTorch, written from the specification -> their gradients"""
    names = l2t.dln_names(cfg.dln_layers)
    P = {names[n]: torch.tensor(p, requires_grad=True) for n, p in dln.items()}
    T = {n: torch.tensor(p, requires_grad=True) for n, p in teacher.items()}
    gru = torch.nn.GRU(5, cfg.gru_size, batch_first=True).double()
    z = torch.tensor(logits, requires_grad=True)
    y = torch.tensor(y)
    gelu, huber = torch.nn.functional.gelu, torch.nn.functional.huber_loss

    def raw(F, live):
        own = {n.partition(".")[2]: p for n, p in P.items() if n.startswith("feature_summarizer")}
        token = cfg.granularity == "token"
        states, last = torch.func.functional_call(gru, own, (F,))
        h = states.flatten(0, 1) if token else last[0]
        if live:
            norm = P["batch_norm.weight"], P["batch_norm.bias"]
            h = torch.nn.functional.batch_norm(h, None, None, *norm, training=True)
        x = h
        for i in range(cfg.dln_layers):
            x = gelu(x @ P[f"net.{3 * i}.weight"].T + P[f"net.{3 * i}.bias"])
        out = f"net.{3 * cfg.dln_layers - 1}"
        r = x @ P[f"{out}.weight"].T + P[f"{out}.bias"]
        r = (r + h @ P["residual.weight"].T + P["residual.bias"] if live else r)[:, 0]
        if cfg.granularity == "batch":
            r = r.mean().expand(len(F))
        return r.reshape(len(F), -1) if token else r

    def features(z):
        logp = torch.log_softmax(z, 2)
        right = logp.gather(2, y[..., None])[..., 0]
        wrong = torch.stack(
            [
                torch.stack(
                    [torch.cat([q[: y[b, t]], q[y[b, t] + 1 :]]) for t, q in enumerate(row)]
                )
                for b, row in enumerate(logp)
            ]
        )
        best = wrong.amax(2)
        F = torch.stack([right, best, right - best, wrong.mean(2), wrong.std(2)], 2)
        return (F - F.mean(1, keepdim=True)) / F.std(1, keepdim=True).clamp_min(1e-4)

    with torch.no_grad():
        F_live = features(z)
        w = raw(F_live, True).sigmoid().clamp(cfg.clamp_low, cfg.clamp_high)
    ce, p = torch.nn.functional.cross_entropy(z.mT, y, reduction="none"), torch.softmax(z, 2)
    reg = {
        "logits": lambda: z.pow(2).mean(2),
        "logits-sum": lambda: z.pow(2).sum(2),
        "entropy": lambda: np.log(z.shape[2]) + (p * p.log()).sum(2),
    }[cfg.regulariser]()
    w = w if cfg.granularity == "token" else w[:, None]
    loss = ((1 - w) * ce + w * 0.1 * reg).mean()
    ce_memory = torch.tensor(ce_memory)
    target = (ce_memory - ce_memory.mean()) / (ce_memory.std() + 1e-6)
    same = cfg.memory_path == "same"
    r = raw(torch.tensor(F_memory), same)
    w = r.sigmoid().clamp(cfg.clamp_low, cfg.clamp_high) if same else r.sigmoid()
    if cfg.granularity == "token":
        r, w = r.mean(1), w.mean(1)
    x = w[:, None]
    if cfg.teacher_input == "weight+features":
        x = torch.cat([x, torch.tensor(F_memory)[:, -1]], 1)
    for i in range(3):
        x = x @ T[f"W_{i}"].T + T[f"b_{i}"]
        x = gelu(x) if i < 2 else x
    H = cfg.huber_reg * huber(x[:, 0], target)
    J_T = H + 0.01 * sum(p.norm() for p in T.values())
    J_D = H + 1e-3 * w.pow(2).mean() + 0.5 * (r / 5).tanh().pow(2).mean() - 2 * w.var()
    J_D = J_D + torch.relu(r.mean() - 1) ** 2
    (loss + J_T + J_D).backward()
    grads = {n: P[names[n]].grad for n in dln}
    grads = {n: np.zeros_like(dln[n]) if g is None else g.numpy() for n, g in grads.items()}
    values = {"loss": loss, "teacher_loss": J_T, "dln_loss": J_D}
    values = {n: v.item() for n, v in values.items()}
    return F_live.numpy(), z.grad.numpy(), {n: p.grad.numpy() for n, p in T.items()}, grads, values


VARIANTS = [
    {"memory_path": "released"},
    {},
    {"granularity": "token", "regulariser": "entropy"},
    {"granularity": "batch", "teacher_input": "weight+features", "huber_reg": 0.3},
    {"granularity": "token", "regulariser": "logits-sum", "teacher_input": "weight+features"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_step_agrees_with_autograd(settings, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    corrected = l2t.CORRECTED | {"clamp_low": 0.3, "clamp_high": 0.7}
    cfg = config(**corrected | settings)
    (teacher, dln), (logits, y) = networks(cfg), student(batch=5)
    F, ce = sample()
    monkeypatch.setattr(l2t_memory, "memory_sample", lambda *_: (F, ce))
    memory = l2t.memory_init(cfg, S, dtype="float64")
    rng = np.random.default_rng(0)
    ours = l2t.released_step(teacher, dln, memory, logits, y, cfg, rng)
    dlogits, teacher_grads, dln_grads, memory, values = ours
    live, *expected, losses = torch_step(torch, teacher, dln, logits, y, F, ce, cfg)
    assert error(memory["features"][:5], live) < 1e-12
    assert error(dlogits, expected[0]) < 1e-13
    for found, wanted in zip((teacher_grads, dln_grads), expected[1:], strict=True):
        assert found.keys() == wanted.keys()
        assert max(error(g, wanted[n]) for n, g in found.items()) < 1e-12
    assert all(abs(values[n] - v) < 1e-13 for n, v in losses.items())


def test_the_floor_of_the_deviation_agrees_with_autograd():
    torch = pytest.importorskip("torch", reason="torch is not installed: no comparison with it")
    cfg, (logits, _) = config(features="corrected"), student()
    y = np.tile(np.array([[2], [0], [10]]), (1, S))
    logits = logits[:, :1] + 1e-5 * logits  # so that nothing varies in time but a little
    F, cache = l2t.features_forward(logits, y, cfg)
    assert 0 < np.abs(F).max() < 1
    z = torch.tensor(logits, requires_grad=True)
    logp = torch.log_softmax(z, 2)
    right = logp[torch.arange(3)[:, None], torch.arange(S), torch.tensor(y)]
    centred = (right - right.mean(1, keepdim=True)) / 1e-4
    assert error(F[..., 0], centred.detach().numpy()) < 1e-9
    dF = np.random.default_rng(0).standard_normal(F.shape) * [1, 0, 0, 0, 0]
    centred.backward(torch.tensor(dF[..., 0]))
    assert error(l2t.features_backward(dF, cache), z.grad.numpy()) < 1e-9


# Features and loss, by their sums


@pytest.mark.parametrize("readable", [False, True])
def test_two_classes_and_one_position(readable, plain):
    """m and μ are the wrong class's log p, σ is 0; without its deviation one position will do"""
    cfg = config(features="corrected", standardise=False)
    logits, y = student()
    logits, y = logits[:, :1, :2], y[:, :1] % 2
    run = plain if readable else lambda f, *args: f(*args)
    F, _ = run(l2t.features_forward, logits, y, cfg)
    logp = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
    right, wrong = (np.take_along_axis(logp, i[..., None], 2)[..., 0] for i in (y, 1 - y))
    expected = [right, wrong, right - wrong, wrong, 0 * wrong]
    assert error(F, np.stack(expected, axis=2)) < 1e-14
    released = dataclasses.replace(cfg, features="released")
    F, _ = run(l2t.features_forward, logits, y, released)
    assert F.shape == (B, 1, 5) and (F[..., 0] == F[..., 1]).all() and np.isfinite(F).all()


@pytest.mark.parametrize("regulariser", l2t.REGULARISERS)
def test_the_regularisers_by_their_sums(regulariser):
    (logits, y), cfg = student(), config(regulariser=regulariser, reg_strength=0.3)
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    each = {
        "logits": (logits**2).mean(axis=2),
        "logits-sum": (logits**2).sum(axis=2),
        "entropy": np.log(V) + (p * np.log(p)).sum(axis=2),
        "weights": np.full((B, S), 7.0),
    }[regulariser]
    ce = -np.log(np.take_along_axis(p, y[..., None], axis=2)[..., 0])
    for granularity in ("sequence", "token"):
        own, w = dataclasses.replace(cfg, granularity=granularity), weights(granularity)
        loss, (found, reg), _ = l2t.student_loss_forward(logits, y, w, own, 7.0)
        assert error(found, ce.mean(axis=1)) < 1e-14
        assert error(reg, 0.3 * each.mean(axis=1)) < 1e-14
        w = w if granularity == "token" else w[:, None]
        assert abs(loss - ((1 - w) * ce + w * 0.3 * each).mean()) < 1e-13
    _, (_, none), _ = l2t.student_loss_forward(0 * logits, y, weights("sequence"), cfg, 0.0)
    assert not none.any()  # uniform: nothing is large, nothing is sure


def test_a_tokens_weight_is_that_of_the_sequence_up_to_it():
    cfg = config(granularity="token", batch_norm=False)
    (_, dln), (F, _) = networks(cfg), sample()
    w, _ = l2t.dln_forward(dln, F, cfg)
    own = dataclasses.replace(cfg, granularity="sequence")
    for t in range(S):
        assert error(w[:, t], l2t.dln_forward(dln, F[:, : t + 1], own)[0]) < 1e-14
    one, other = (  # of one position: the rows of BatchNorm are the same too
        l2t.dln_forward(dln, F[:, :1], dataclasses.replace(c, batch_norm=True))[0]
        for c in (cfg, own)
    )
    assert (one[:, 0] == other).all()


def test_a_batchs_weight_is_that_of_the_mean():
    cfg = config(granularity="batch")
    (_, dln), (F, _) = networks(cfg), sample()
    w, _ = l2t.dln_forward(dln, F, cfg)
    r, _ = l2t.raw_forward(dln, F, dataclasses.replace(cfg, granularity="sequence"), True)
    assert (w == w[0]).all() and abs(w[0] - 1 / (1 + np.exp(-r.mean()))) < 1e-15


def test_equal_weights_of_tokens_are_those_of_sequences():
    (logits, y), cfg = student(), config(loss_form="additive", regulariser="entropy")
    w, token = weights("sequence"), dataclasses.replace(cfg, granularity="token")
    one, _, cache = l2t.student_loss_forward(logits, y, w, cfg)
    other, _, many = l2t.student_loss_forward(logits, y, np.tile(w[:, None], (1, S)), token)
    (dz, dw, _), (each, dwt, _) = (l2t.student_loss_backward(1.0, c) for c in (cache, many))
    assert abs(one - other) < 1e-15 and error(each, dz) < 1e-15
    assert error(dwt.sum(axis=1), dw) < 1e-15


def test_without_a_teacher_there_are_the_penalties_alone():
    cfg = config(huber_reg=0.0, teacher_norm_reg=0.0)
    (teacher, dln), (F, ce) = networks(cfg), sample()
    total, values, cache = l2t.teaching_forward(teacher, dln, F, ce, cfg)
    r, _ = l2t.raw_forward(dln, F, cfg, False)
    penalty, _ = l2t.weight_penalty_forward(r, l2t.weight_forward(r)[0], cfg)
    assert total == values["dln_loss"] == penalty and values["teacher_loss"] == 0
    assert values["huber"] > 0
    teacher_grads, grads = l2t.teaching_backward(1.0, cache)
    assert not any(g.any() for g in teacher_grads.values()) and grads["W"].any()
    larger = {n: 3 * p for n, p in teacher.items()}
    _, _, cache = l2t.teaching_forward(larger, dln, F, ce + 1, cfg)
    assert all((g == grads[n]).all() for n, g in l2t.teaching_backward(1.0, cache)[1].items())


def test_a_teacher_that_sees_the_features_sees_the_last_ones():
    cfg = config(teacher_input="weight+features")
    (teacher, dln), (F, ce) = networks(cfg), sample()
    assert teacher["W_0"].shape == (6, 6)
    _, values, _ = l2t.teaching_forward(teacher, dln, F, ce, cfg)
    x = np.concatenate([values["weight"][:, None], F[:, -1]], axis=1)
    assert (values["prediction"] == l2t.mlp_forward(teacher, x, 2)[0]).all()

    def backward(dy, cache):
        dw, grads = l2t.teacher_backward(dy, cache)
        return grads | {"w": dw}

    forward = lambda a: l2t.teacher_forward(a, a["w"], F[:, -1])  # noqa: E731
    check(forward, backward, teacher | {"w": values["weight"]})


# The twins


def summaries(logits, y, cfg, plain):
    return l2t.summarise(logits, y, cfg), plain(l2t.summarise, logits, y, cfg)


@pytest.mark.parametrize("classes", [2, 3, 15, 16, 33, 2100])
@pytest.mark.parametrize("dtype, allowed", [("float32", 2e-6), ("float64", 1e-13)])
def test_twins_agree_with_the_readable_form(dtype, allowed, classes, plain):
    rng = np.random.default_rng(classes)
    logits = (3 * rng.standard_normal((B, S, classes))).astype(dtype)
    y = rng.integers(0, classes, (B, S))
    y[0], y[1, :3] = logits[0].argmax(axis=1), [0, classes - 1, 0]
    logits[2, 0] = logits[2, 0, 0]  # all of them the largest
    coefficients = rng.standard_normal((4, B, S)).astype(dtype)
    for regulariser, features in (("logits", "corrected"), ("entropy", "corrected")):
        cfg = config(features=features, regulariser=regulariser)
        ours, expected = summaries(logits, y, cfg, plain)
        assert ours.keys() == expected.keys() and len(ours) == 7
        for name, x in ours.items():
            assert x.dtype == expected[name].dtype == dtype
            assert np.abs(x - expected[name]).max() < allowed * (1 + np.abs(expected[name]).max())
        used = [*coefficients]
        used[1 if regulariser == "logits" else 2] *= 0
        found = l2t._logit_gradient(logits, y, ours, used, cfg)
        readable = plain(l2t._logit_gradient, logits, y, expected, used, cfg)
        assert found.dtype == dtype and error(found, readable) < allowed
    strided = np.repeat(logits, 2, axis=2)[..., ::2]
    again = l2t.summarise(strided, y.astype("int32"), cfg)
    assert all((again[n] == x).all() for n, x in ours.items())


@pytest.mark.parametrize("readable", [False, True])
def test_the_rounding_noise_of_float32_is_in_kind(readable, plain):
    """As the published code's: channel 4 two or three neighbours of -1e9, channel 5 1e7"""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 30, 10_000), dtype="float32")
    run = plain if readable else lambda f, *args: f(*args)
    cfg = config(standardise=False)
    F, _ = run(l2t.features_forward, logits, rng.integers(0, 10_000, (2, 30)), cfg)
    assert set(np.unique(F[..., 3]) + 1e9) <= {-128, -64, 0, 64, 128}
    assert 2 <= len(np.unique(F[..., 3])) <= 4 and np.abs(F[..., 4] - 1e7).max() <= 2


def test_threads_do_not_change_the_twins():
    rng = np.random.default_rng(0)
    logits, y = rng.standard_normal((8, 50, 999)).astype("float32"), rng.integers(0, 999, (8, 50))
    threads, runs = backend.threads(), []
    try:
        for n in (1, min(2, threads)):
            backend.set_threads(n)
            for features in ("released", "corrected"):
                cfg = config(features=features)
                summary = l2t.summarise(logits, y, cfg)
                dlogits, _ = l2t.student_step(logits, y, weights("sequence", 8, "float32"), cfg)
                runs.append([*summary.values(), dlogits])
    finally:
        backend.set_threads(threads)
    for one, two in zip(runs[:2], runs[2:], strict=True):
        assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_corrected_features_by_their_sums():
    cfg, (logits, y) = config(features="corrected", standardise=False), student()
    F, _ = l2t.features_forward(logits, y, cfg)
    for b in range(B):
        for s in range(S):
            p = np.exp(logits[b, s]) / np.exp(logits[b, s]).sum()
            right, wrong = np.log(p[y[b, s]]), np.log(np.delete(p, y[b, s]))
            expected = [right, wrong.max(), right - wrong.max(), wrong.mean(), wrong.std(ddof=1)]
            assert error(F[b, s], np.array(expected)) < 1e-13
    standardised, _ = l2t.features_forward(logits, y, config(features="corrected"))
    expected = (F - F.mean(axis=1, keepdims=True)) / F.std(axis=1, ddof=1, keepdims=True)
    assert error(standardised, expected) < 1e-13


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_released_features_are_degenerate(dtype):
    logits, y = student(dtype=dtype)
    F, cache = l2t.features_forward(logits, y, config(standardise=False))
    assert (F[..., 1] == F[..., 0]).all() and not F[..., 2].any()
    exact, _ = l2t.features_forward(logits.astype("float64"), y, config(features="corrected"))
    F, cache = l2t.features_forward(logits, y, config())
    assert F.dtype == dtype and (F[..., 1] == F[..., 0]).all() and not F[..., 2].any()
    assert error(F[..., 0], exact[..., 0]) < (1e-12 if dtype == "float64" else 1e-5)
    with pytest.raises(Error, match="rounding noise"):
        l2t.features_backward(F, cache)


def test_what_the_noise_of_the_released_features_tends_to():
    """In float64, as V grows: the mean of the wrong log p, and how far the right one is from it"""
    rng = np.random.default_rng(0)
    logits, y = rng.standard_normal((2, 9, 50)), rng.integers(0, 50, (2, 9))
    F, _ = l2t.features_forward(logits, y, config())
    plain, _ = l2t.features_forward(logits, y, config(features="corrected", standardise=False))
    for channel, limit in ((3, plain[..., 3]), (4, plain[..., 0] - plain[..., 3])):
        centred = limit - limit.mean(axis=1, keepdims=True)
        expected = centred / limit.std(axis=1, ddof=1, keepdims=True)
        assert error(F[..., channel], expected) < 1e-4


def test_the_student_loss_is_cross_entropy_and_the_size_of_logits():
    (logits, y), cfg = student(), config()

    def loss(w, **settings):
        own = dataclasses.replace(cfg, **settings)
        weights = np.full(B, float(w))
        value, parts, cache = l2t.student_loss_forward(logits, y, weights, own)
        return value, l2t.student_loss_backward(1.0, cache)[0], parts

    ce, cache = nn.softmax_cross_entropy_forward(logits, y)
    dce = nn.softmax_cross_entropy_backward(1.0, cache)
    size, dsize = 0.1 * (logits**2).mean(), 0.2 * logits / logits.size
    for w, value, gradient in ((0, ce, dce), (1, size, dsize), (0.5, (ce + size) / 2, None)):
        found, dlogits, (each_ce, each_size) = loss(w)
        gradient = (dce + dsize) / 2 if gradient is None else gradient
        assert abs(found - value) < 1e-14 and error(dlogits, gradient) < 1e-14
        assert abs(each_ce.mean() - ce) < 1e-14 and abs(each_size.mean() - size) < 1e-14
    found, dlogits, _ = loss(0.7, loss_form="additive")
    assert abs(found - ce - 0.7 * size) < 1e-14 and error(dlogits, dce + 0.7 * dsize) < 1e-14


# Memory


def entries(first, count):
    """Features and losses that tell which entry they are"""
    which = first + np.arange(float(count))
    return np.tile(which[:, None, None], (1, S, 5)), which


def test_the_memory_is_a_ring():
    cfg = config(memory_size=7)
    memory = l2t.memory_init(cfg, S, dtype="float64")
    for first, expected in (
        (1, [1, 2, 3, 0, 0, 0, 0]),
        (4, [1, 2, 3, 4, 5, 6, 0]),
        (7, [8, 9, 3, 4, 5, 6, 7]),
        (10, [8, 9, 10, 11, 12, 6, 7]),
    ):
        before = {n: np.copy(v) for n, v in memory.items()}
        new = l2t_memory.memory_write(memory, *entries(first, 3))
        assert all((memory[n] == v).all() for n, v in before.items())
        memory = new
        assert memory["ce"].tolist() == expected
        assert (memory["features"] == memory["ce"][:, None, None]).all()
    assert memory["count"] == 7 and memory["at"] == 5
    full = l2t_memory.memory_write(memory, *entries(20, 7))
    assert sorted(full["ce"]) == [20, 21, 22, 23, 24, 25, 26] and full["at"] == 5


def test_fewer_entries_than_the_batch_are_zeros():
    cfg, rng = config(), np.random.default_rng(0)
    memory = l2t_memory.memory_write(l2t.memory_init(cfg, S), *entries(1, 3))
    before = rng.bit_generator.state
    F, ce = l2t_memory.memory_sample(memory, 4, cfg, rng)
    assert F.shape == (4, S, 5) and not F.any() and ce.tolist() == [0, 0, 0, 0]
    assert F.dtype == ce.dtype == "float32" and rng.bit_generator.state == before
    F, ce = l2t_memory.memory_sample(memory, 3, cfg, rng)
    assert set(ce) <= {1, 2, 3} and not (F - ce[:, None, None]).any()


def test_the_batch_is_written_before_the_memory_is_sampled():
    cfg, rng = config(), np.random.default_rng(0)
    empty = l2t.memory_init(cfg, S, dtype="float64")
    memory, F, ce = l2t_memory.memory_exchange(empty, *entries(1, 3), cfg, rng)
    assert set(ce) <= {1, 2, 3} and not (F - ce[:, None, None]).any() and memory["count"] == 3
    after = dataclasses.replace(cfg, write_first=False)
    memory, F, ce = l2t_memory.memory_exchange(empty, *entries(1, 3), after, rng)
    assert not F.any() and not ce.any() and memory["count"] == 3
    for _ in range(20):
        _, _, ce = l2t_memory.memory_exchange(memory, *entries(4, 3), after, rng)
        assert set(ce) <= {1, 2, 3}


@pytest.mark.parametrize("settings", [{}, {"noise": 0.0}, {"temperature": 0.5}], ids=str)
def test_sampling_probabilities(settings):
    cfg, rng = config(**settings), np.random.default_rng(0)
    ce, uniform = 3 * rng.random(6), rng.random(6)
    p = l2t_memory.sampling_probabilities(ce, uniform, cfg)
    softmax = [np.exp(c / cfg.temperature) for c in ce]
    weights = [
        0.5 * s / sum(softmax) + 0.5 / 6 + cfg.noise * u
        for s, u in zip(softmax, uniform, strict=True)
    ]
    assert error(p, np.array(weights) / sum(weights)) < 1e-14 and abs(p.sum() - 1) < 1e-15
    large = l2t_memory.sampling_probabilities(np.array([1e5, 0, 0], "float32"), np.zeros(3), cfg)
    assert error(large, np.array([2 / 3, 1 / 6, 1 / 6])) < 1e-15


def test_samples_have_these_probabilities():
    cfg, rng = config(noise=0.0, temperature=0.7), np.random.default_rng(0)
    memory = l2t_memory.memory_write(l2t.memory_init(cfg, S, dtype="float64"), *entries(1, 5))
    drawn = np.concatenate([l2t_memory.memory_sample(memory, 5, cfg, rng)[1] for _ in range(8000)])
    shares = np.array([(drawn == i).mean() for i in range(1, 6)])
    p = l2t_memory.sampling_probabilities(memory["ce"][:5], np.zeros(5), cfg)
    assert len(set(p.round(3))) == 5 and np.abs(shares - p).max() < 4 * np.sqrt(0.25 / 40_000)


def test_memories_refuse_what_does_not_fit():
    memory = l2t.memory_init(config(memory_size=3), S)
    with pytest.raises(Error, match="a memory of 3 entries is smaller than the batch of 4"):
        l2t_memory.memory_write(memory, *entries(0, 4))
    with pytest.raises(Error, match=r"this memory takes \(2, 7, 5\)"):
        l2t_memory.memory_write(memory, np.zeros((2, S + 1, 5)), np.zeros(2))


# The step


def step(cfg, batch=4, dtype="float64", put=np.copy, steps=3):
    """Some steps from an empty memory -> everything that they return, by name"""
    teacher, dln = ({n: put(p) for n, p in net.items()} for net in networks(cfg, dtype))
    rngs = np.random.default_rng(1), np.random.default_rng(2) if cfg.dln_dropout else None
    xp = backend.array_module(dln["W"])
    memory, results = l2t.memory_init(cfg, S, xp, dtype), {}
    square = put(np.array(3.0, dtype)) if cfg.regulariser == "weights" else None
    for i in range(steps):
        logits, y = student(i, batch, dtype)
        given = put(logits), put(y), cfg, *(rngs if square is None else (*rngs, square))
        made = l2t.released_step(teacher, dln, memory, *given)
        dlogits, teacher_grads, dln_grads, memory, values = made
        if cfg.regulariser != "weights":
            assert values.pop("square_gradient") == 0.0
        results |= {f"{i} dlogits": dlogits} | {f"{i} {n}": v for n, v in values.items()}
        results |= {f"{i} T {n}": g for n, g in teacher_grads.items()}
        results |= {f"{i} D {n}": g for n, g in dln_grads.items()}
        results |= {f"{i} M {n}": memory[n] for n in ("features", "ce")}
    return results


def released_noise(name):
    """What depends on channels 4 and 5 of the released features, and so on rounding"""
    return not name.endswith((" ce", " reg"))


OPTIONS = [
    {},
    {"features": "corrected", "memory_path": "same", "dln_dropout": 0.2},
    {"features": "corrected", "loss_form": "additive", "huber_twice": False, "write_first": False},
    {"features": "corrected", "standardise": False, "batch_norm": False, "dln_residual": False},
    {"features": "corrected", "regulariser": "entropy", "granularity": "token", "dln_dropout": 0.2},
    {"features": "corrected", "regulariser": "weights", "granularity": "batch", "huber_reg": 0.5},
    {"features": "corrected", "regulariser": "weights", "granularity": "token"},
    {"features": "corrected", "regulariser": "logits-sum", "teacher_input": "weight+features"},
]


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_steps_stay_on_the_device_and_in_float32(settings):
    cfg = config(**settings)
    expected = step(cfg)
    on_device = step(cfg, put=strict.array)
    for name, value in on_device.items():
        assert type(value).__module__ == "strict", name
        if not (released_noise(name) and cfg.features == "released"):
            assert error(backend.to_host(value), expected[name]) < 1e-12, name
    single = step(cfg, dtype="float32")
    wrong = [n for n, v in single.items() if v.dtype != "float32"]
    assert wrong == [] and all(np.isfinite(v).all() for v in single.values())
    again = step(cfg, dtype="float32")
    assert all((v == again[n]).all() for n, v in single.items())


@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_the_step_is_its_parts(settings):
    """With the weights given, to whoever has others"""
    cfg = config(**settings)
    expected, (teacher, dln) = step(cfg, steps=1), networks(cfg)
    logits, y = student(0, 4)
    square = 3.0 if cfg.regulariser == "weights" else None
    rng, dropout = np.random.default_rng(1), np.random.default_rng(2) if cfg.dln_dropout else None
    F, _ = l2t.features_forward(logits, y, cfg)
    w, _ = l2t.dln_forward(dln, F, cfg, dropout)
    dlogits, values = l2t.student_step(logits, y, w, cfg, square)
    memory = l2t.memory_init(cfg, S, dtype="float64")
    taught = l2t.teaching_step(teacher, dln, memory, F, values["ce"], cfg, rng, dropout)
    teacher_grads, dln_grads, memory, more = taught
    found = {"dlogits": dlogits} | values | more | {f"M {n}": memory[n] for n in ("features", "ce")}
    found |= {f"T {n}": g for n, g in teacher_grads.items()}
    found |= {f"D {n}": g for n, g in dln_grads.items()}
    assert expected.keys() <= {f"0 {n}" for n in found}
    assert all((found[n[2:]] == x).all() for n, x in expected.items())


@pytest.mark.parametrize("features", ["released", "corrected"])
def test_nothing_is_written_to(features, plain):
    cfg = config(features=features, regulariser="entropy")
    (teacher, dln), (logits, y) = networks(cfg), student(batch=4)
    before, memory = logits.copy(), l2t.memory_init(cfg, S, dtype="float64")
    args = teacher, dln, memory, logits, y, cfg, np.random.default_rng(0)
    plain(l2t.released_step, *args)
    l2t.released_step(*args)
    assert (logits == before).all() and not memory["features"].any() and memory["count"] == 0


def test_odd_memory_layouts_and_read_only_arrays():
    cfg = config(features="corrected")

    def fixed(x):
        x = x.copy()
        x.flags.writeable = False
        return x

    def cut(x):
        return np.repeat(x, 2, axis=-1)[..., ::2]

    expected = step(cfg)
    for put in (np.asfortranarray, cut, fixed):
        for name, value in step(cfg, put=put).items():
            assert error(value, expected[name]) < 1e-12, name


def test_sequences_of_two_and_batches_of_two():
    cfg = config()
    (teacher, dln), (logits, y) = networks(cfg), student(batch=2)
    memory = l2t.memory_init(cfg, 2, dtype="float64")
    args = memory, logits[:, :2], y[:, :2], cfg, np.random.default_rng(0)
    *_, values = l2t.released_step(teacher, dln, *args)
    assert all(np.isfinite(v).all() for v in values.values())


def test_only_the_student_feels_its_loss_and_only_the_teacher_its_norms():
    """What (5) is reaches no network: their gradients are the same with any λ₀"""
    one, other = (step(config(reg_strength=s), steps=1) for s in (0.1, 5.0))
    for name, value in one.items():
        same = (value == other[name]).all()
        assert same == (name not in ("0 dlogits", "0 loss", "0 reg")), name
    free = step(config(teacher_norm_reg=0.0), steps=1)
    for name, value in one.items():
        assert (value == free[name]).all() == (" T " not in name and name != "0 teacher_loss"), name


def test_what_is_trained():
    """In the memory's path there is neither norm nor residual, unless it is the same as the live"""
    for settings, trained in (({}, False), (l2t.CORRECTED, True)):
        results = step(config(**settings), steps=1)
        for name in ("norm_weight", "norm_bias", "W_r", "b_r"):
            assert results[f"0 D {name}"].any() == trained


# Settings and bad input


def test_the_published_sizes():
    cfg, rng = l2t.Config(), np.random.default_rng(0)
    dln, teacher = l2t.dln_init(cfg, rng), l2t.teacher_init(cfg, rng)
    assert sum(p.size for p in dln.values()) == 228_098
    assert sum(dln[n].size for n in "WUbc") == 13_632
    shapes = {n: p.shape for n, p in teacher.items()}
    assert shapes["W_0"] == (128, 1) and shapes["W_1"] == (128, 128) and shapes["W_2"] == (1, 128)
    assert teacher["b_2"].tolist() == [15] and teacher["b_1"].any()
    assert {p.dtype.name for p in (dln | teacher).values()} == {"float32"}
    assert np.abs(dln["U"]).max() <= 1 / 8 and np.abs(dln["W_1"]).max() <= 1 / 16
    names = l2t.dln_names(4)
    assert names["W_4"] == "net.11.weight" and names["b_3"] == "net.9.bias"
    assert names.keys() == dln.keys() and l2t.teacher_names().keys() == teacher.keys()
    corrected = dataclasses.replace(cfg, **l2t.CORRECTED)
    assert (corrected.features, corrected.memory_path) == ("corrected", "same")


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"features": "fixed"}, "features='fixed' is not known; expected one of: released"),
        ({"memory_path": "live"}, "memory_path='live'"),
        ({"loss_form": "sum"}, "loss_form='sum'"),
        ({"dln_layers": 0}, "dln_layers=0: expected at least 1"),
        ({"memory_size": 0}, "memory_size=0: expected at least 1"),
        ({"dln_size": 0}, "dln_size=0: expected at least 1"),
        ({"clamp_low": 0.5, "clamp_high": 0.5}, "0 <= clamp_low < clamp_high <= 1"),
        ({"clamp_high": 1.5}, "clamp_low=0.05, clamp_high=1.5"),
        ({"dln_dropout": 1.0}, "dln_dropout=1.0: expected 0 <= dln_dropout < 1"),
        ({"granularity": "word"}, "granularity='word' is not known; expected one of: sequence"),
        ({"teacher_input": "features"}, "teacher_input='features'"),
        ({"regulariser": "l2"}, "regulariser='l2' is not known; expected one of: logits, logits-s"),
        ({"huber_reg": -1.0}, "huber_reg=-1.0: expected 0 or more"),
        ({"temperature": 0.0}, "temperature=0.0: expected more than 0"),
        ({"huber_delta": float("nan")}, "huber_delta=nan: expected more than 0"),
        ({"noise": -1.0}, "noise=-1.0: expected 0 or more"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    with pytest.raises(Error, match=sentence):
        config(**settings)


def test_bad_input():
    cfg, (logits, y) = config(), student()
    (teacher, dln), (F, ce) = networks(cfg), sample()
    for run in (
        lambda z, y: l2t.features_forward(z, y, cfg),
        lambda z, y: l2t.student_loss_forward(z, y, np.ones(B), cfg),
    ):
        with pytest.raises(Error, match=r"expected \(B, S, V\) and \(B, S\)"):
            run(logits, y[:, 1:])
        with pytest.raises(Error, match=r"expected \(B, S, V\) and \(B, S\)"):
            run(logits[0], y[0])
        for wrong in (-1, V):
            with pytest.raises(Error, match="a target is outside the 11 classes"):
                run(logits, np.where(y == y[0, 0], wrong, y))
    with pytest.raises(Error, match="features of 1 positions"):
        l2t.features_forward(logits[:, :1], y[:, :1], cfg)
    with pytest.raises(
        Error, match="features of 7 positions and 1 classes: expected at least 2 and"
    ):
        l2t.features_forward(logits[..., :1], y * 0, cfg)
    with pytest.raises(Error, match=r"sequence weights \(3, 7\): for these logits expected \(3,\)"):
        l2t.student_loss_forward(logits, y, weights("token"), cfg)
    with pytest.raises(Error, match=r"token weights \(3,\): for these logits expected \(3, 7\)"):
        l2t.student_loss_forward(logits, y, np.ones(B), config(granularity="token"))
    with pytest.raises(Error, match=r"the regulariser weights needs .*, the argument square"):
        l2t.student_loss_forward(logits, y, np.ones(B), config(regulariser="weights"))
    with pytest.raises(Error, match="a batch of 1 sequence has no deviation"):
        l2t.teaching_forward(teacher, dln, F[:1], ce[:1], cfg)
    small = l2t.memory_init(config(memory_size=2), S, dtype="float64")
    with pytest.raises(Error, match="a memory of 2 entries is smaller than the batch of 3"):
        l2t.released_step(teacher, dln, small, logits, y, cfg, np.random.default_rng(0))


def test_a_class_that_is_none_makes_the_loss_nan_on_the_device():
    (logits, y), cfg = student(), config(features="corrected")
    for wrong in (-1, V):
        y[0, 0] = wrong
        z, there, w = strict.array(logits), strict.array(y), strict.array(np.ones(B) / 2)
        loss, (ce, _), _ = l2t.student_loss_forward(z, there, w, cfg)
        assert np.isnan(backend.to_host(loss))
        assert np.isnan(backend.to_host(ce)).tolist() == [True, False, False]


def test_the_command_line(ref, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    for part in ("features", "dln", "teacher", "student-loss"):
        out, _ = ref("case", "--model", "l2t", "--part", part, "-B", 3, "-L", 5, "-o", path)
        assert f"l2t {part}, float64" in out
        out, _ = ref("verify", path)
        assert "ok  (l2t" in out
    _, err = ref(*("case", "--model", "l2t", "--part", "teacher", "-B", 1, "-o", path), expect=1)
    assert "a batch of 1 sequence has no deviation" in err
    arguments = ("case", "--model", "l2t", "--part", "dln", "--features", "x", "-o", path)
    with monkeypatch.context() as m:  # sys.argv is where the options of a model are looked for
        m.setattr("sys.argv", ["ref", *map(str, arguments)])
        _, err = ref(*arguments, expect=2)
    assert "features='x' is not known" in err
