"""The findings of ref.audit about L2T-Hyena."""

import math

import numpy as np

from ref import hyena, l2t, l2t_memory, network, nn, optim
from ref.audit import apart, finding, made, random

PTB = {"train": 929_589, "valid": 73_760}  # tokens of Penn Treebank, to count with
WINDOW, BATCH, EPOCHS, CLASSES = 64, 128, 10, 10_000  # of L2T-Hyena on it


@finding(
    "L2T-Hyena, features of the loss network",
    "float32, V = {V:,}: |channel 2 - channel 1| <= {second:g}, |channel 3| <= {third:g}, channel "
    "4 has {values} values in {count} positions, channel 5 is {fifth:.0e} ± {spread:.0e}; channel "
    "4 correlates {noise:+.2f} with itself in float64 (corrected: {corrected:+.2f})",
)
def l2t_mask():
    """-1e9 is added to the wrong classes in the place of the right one: best wrong class, mean and
    deviation become log p_y, and what cancellation at 1e9 leaves. Here: features="corrected"."""
    y, noise = np.random.default_rng(1).integers(0, CLASSES, (2, 32)), {}
    logits = random(2, 32, CLASSES).astype("float32")
    for name in ("released", "corrected"):
        cfg = l2t.Config(features=name)
        pair = [l2t.features_forward(logits.astype(d), y, cfg)[0][..., 3] for d in "fd"]
        # a little noise: one channel may be constant
        noise[name] = float(np.corrcoef(*(a.ravel() + 1e-9 * random(a.size) for a in pair))[0, 1])
    one, two, three, four, five = np.moveaxis(
        l2t.features_forward(logits, y, l2t.Config(standardise=False))[0], 2, 0
    )
    numbers = {"second": abs(two - one).max(), "third": abs(three).max()}
    numbers |= {"fifth": five.mean(), "spread": five.std()}
    numbers = {name: float(value) for name, value in numbers.items()}
    numbers |= {"noise": noise["released"], "corrected": noise["corrected"]}
    return numbers | {"V": CLASSES, "values": len(np.unique(four)), "count": four.size}


def _memory(cfg):
    """What is drawn from the memory, features and losses; teacher and loss network"""
    return (
        random(64, 32, 5),
        5 + random(64),
        made(l2t.teacher_init, cfg),
        made(l2t.dln_init, cfg),
    )


def _loss_gradient(cfg, order=1):
    """Gradient of the loss network by name, and that of Huber's loss in the predictions (B,)"""
    F, ce, teacher, dln = _memory(cfg)
    _, values, cache = l2t.teaching_forward(teacher, dln, F, ce[::order], cfg)
    _, huber = nn.huber_forward(values["prediction"], values["target"])
    return l2t.teaching_backward(1.0, cache)[1], nn.huber_backward(1.0, huber)[0]


def _flat(grads):
    return np.concatenate([g.ravel() for g in grads.values()])


@finding(
    "L2T-Hyena, loss network on the memory",
    "gradient exactly 0 in {untrained} of {parameters:,} parameters ({names}); at the start the "
    "weights of the two paths are {difference:.2f} apart on average, and deviate by {live:.2f} and "
    "{stored:.4f}",
)
def l2t_memory_path():
    """The weights that the student gets pass a batch norm and a linear map beside the layers; those
    that are trained, of the memory, pass neither. So the map that is used is not the one that is
    trained, and what is only in the former keeps its initial values. Here: memory_path="same"."""
    cfg = l2t.Config()
    (F, _, _, dln), (grads, _) = _memory(cfg), _loss_gradient(cfg)
    names = [name for name, g in grads.items() if not g.any()]
    live, _ = l2t.dln_forward(dln, F, cfg)
    stored, _ = l2t.weight_forward(l2t.raw_forward(dln, F, cfg, False)[0])
    numbers = {"difference": abs(live - stored).mean(), "live": live.std(), "stored": stored.std()}
    sizes = {"untrained": sum(dln[name].size for name in names)}
    sizes["parameters"] = sum(p.size for p in dln.values())
    return numbers | sizes | {"names": ", ".join(names)}


@finding(
    "L2T-Hyena, loss network in training mode",
    "the weight of one sequence in several batches of {B} deviates by {own:.3f}, the weights of "
    "the sequences of one batch by {between:.3f}",
)
def l2t_batch_norm():
    """Batch norm takes the moments of its batch: a sequence's weight depends on the others."""
    cfg, B = l2t.Config(), 8
    F, _, _, dln = _memory(cfg)
    batches = [np.concatenate([F[:1], F[i : i + B - 1]]) for i in range(1, 57, B - 1)]
    weights = np.stack([l2t.dln_forward(dln, batch, cfg)[0] for batch in batches])
    return {"B": B, "own": float(weights[:, 0].std()), "between": float(weights.std(axis=1).mean())}


@finding(
    "L2T-Hyena, the student's optimiser",
    "the embedding moves {one:.2f} times as far in the first step, {many:.2f} times in {steps}; "
    "its part of the norm that is clipped counts {norm:.2f} times",
)
def l2t_tied_embedding():
    """The tied embedding comes twice from the iterator over the parameters: AdamW steps it twice
    with the same gradient, and its square counts twice in the norm. Here: double_embedding."""
    steps, moved, g = 100, {}, {"W": random(1000)}
    for times in (1, 2):
        p, groups = {"W": random(1000, seed=1)}, {"W": optim.Group(2e-4, 0.15)}
        first, moments = p["W"].copy(), optim.adamw_init(p)
        for step in range(1, steps + 1):
            noisy = {"W": g["W"] + random(1000, seed=1 + step)}
            for number in range(times * (step - 1) + 1, times * step + 1):
                optim.adamw_update(p, noisy, moments, number, groups)
            moved[times, step] = float(np.linalg.norm(p["W"] - first))
    ratio = {name: moved[2, n] / moved[1, n] for name, n in (("one", 1), ("many", steps))}
    norm = optim.gradient_norm({"W": g["W"], "tied": g["W"]}) / optim.gradient_norm(g)
    return ratio | {"steps": steps, "norm": norm}


@finding(
    "L2T-Hyena, the student at its start",
    "d = 256, V = {V:,}: mean squared logit {square:.0f}, cross-entropy {loss:.0f}, where ln V is "
    "{log_v:.2f}; with a deviation of 0.02 {small_square:.2f} and {small_loss:.2f}",
)
def l2t_embedding():
    """The token embedding starts N(0, 1) and is tied to the head, behind a layer norm: logits have
    the deviation sqrt(d), and a penalty on them much to do. Here: embedding_std."""
    rng, numbers = np.random.default_rng(0), {"V": CLASSES, "log_v": math.log(CLASSES)}
    form = {"filter": "gated", "recurrence": "residual", "block": "bare"}
    layer, tokens = (
        hyena.Config(256, l_max=WINDOW, **form),
        rng.integers(0, CLASSES, (2, WINDOW + 1)),
    )
    of = {"decoder": "lm", "tied": True, "final_norm": True, "positions": WINDOW}
    for prefix, deviation in (("", 1.0), ("small_", 0.02)):
        cfg = network.Config("hyena", layer, 6, CLASSES, CLASSES, embedding_std=deviation, **of)
        logits, _ = network.forward(made(network.init, cfg, "float32"), tokens[:, :-1], cfg)
        loss, _ = nn.softmax_cross_entropy_forward(logits, tokens[:, 1:])
        numbers |= {f"{prefix}square": float((logits**2).mean()), f"{prefix}loss": float(loss)}
    return numbers


@finding(
    "L2T-Hyena, the teacher's start",
    "with other targets the gradient in its predictions changes by {huber_15:g} and the loss "
    "network's by {dln_15:g}, with a bias of 0 by {huber_0:.0%} and {dln_0:.0%}; until its mean "
    "prediction is below 1, {left:.0%} of a training's steps pass",
)
def l2t_teacher_bias():
    """The output's bias starts at 15, the targets are standardised: Huber's loss is linear there,
    and its gradient the same for all targets. Until the bias is gone neither network learns from
    how well the student did. (The last number: 1/100 of the steps, at 100 times the rate.)"""
    numbers, silent = {}, dict.fromkeys(("saturation_reg", "variance_bonus", "dln_weight_reg"), 0)
    for bias in (15, 0):
        cfg = l2t.Config(teacher_bias=bias, raw_mean_reg=0, **silent)
        first, other = (_loss_gradient(cfg, order) for order in (1, -1))
        numbers[f"dln_{bias}"] = apart(_flat(other[0]), _flat(first[0]))
        numbers[f"huber_{bias}"] = apart(other[1], first[1])
    params, rng = made(l2t.teacher_init, l2t.Config(), "float32"), np.random.default_rng(0)
    moments, groups = optim.adamw_init(params), dict.fromkeys(params, optim.Group(2e-4, 0.01))
    total, step, guess = EPOCHS * _windows("train") // BATCH // 100, 0, np.array(math.inf)
    while guess.mean() > 1 and step < total:
        step += 1
        w, target = rng.uniform(0.4, 0.6, 64).astype("f"), rng.standard_normal(64).astype("f")
        guess, cache = l2t.teacher_forward(params, w)
        _, huber = nn.huber_forward(guess, target)
        _, grads = l2t.teacher_backward(nn.huber_backward(1.0, huber)[0], cache)
        scale = 0.5 * (1 + math.cos(math.pi * step / total))
        optim.adamw_update(params, grads, moments, step, groups, scale)
    return numbers | {"left": step / total}


@finding(
    "L2T-Hyena, the training loss in its log",
    "mean weight {weight:.2f}: {logged:.2f} is logged where the cross-entropy is {loss:.2f}, as a "
    "perplexity {logged_ppl:,.0f} in the place of {ppl:,.0f}",
)
def l2t_logged_loss():
    """The epoch's log averages the weighted loss (1 - w) CE + w R, about half of the cross-entropy:
    it cannot be compared with a baseline's training loss. Here "loss" is the cross-entropy."""
    cfg, rng = l2t.Config(), np.random.default_rng(0)
    y = rng.integers(0, CLASSES, (16, 32))
    logits = rng.standard_normal((16, 32, CLASSES), dtype="float32")
    np.put_along_axis(logits, y[..., None], 5.0, axis=2)  # about as after training
    F, _ = l2t.features_forward(logits, y, cfg)
    w, _ = l2t.dln_forward(made(l2t.dln_init, cfg, "float32"), F, cfg)
    logged, (ce, _), _ = l2t.student_loss_forward(logits, y, w, cfg)
    numbers = {"weight": float(w.mean()), "logged": float(logged), "loss": float(ce.mean())}
    return numbers | {"ppl": math.exp(numbers["loss"]), "logged_ppl": math.exp(numbers["logged"])}


@finding(
    "L2T-Hyena, the control that is not there",
    "gradients {difference:.0e} apart; the bounds of w are strengths of {low:.4f} and {high:.1f}, "
    "w = 0.5 is {middle:.2f}",
)
def l2t_static():
    """(1 - w) CE + w λ R with a constant w is, but for a factor that Adam does not see, CE with a
    fixed penalty of strength λ w / (1 - w). Only beside that can adaptive weights show a gain."""
    logits, y = random(4, 16, 50), np.random.default_rng(0).integers(0, 50, (4, 16))
    w, cfg = np.full(4, 0.3), l2t.Config()
    convex, _ = l2t.student_step(logits, y, w, cfg)
    fixed, _ = l2t.student_step(logits, y, w / (1 - w), l2t.Config(loss_form="additive"))
    bounds = {"low": cfg.clamp_low, "middle": 0.5, "high": cfg.clamp_high}
    strengths = {name: cfg.reg_strength * bound / (1 - bound) for name, bound in bounds.items()}
    return strengths | {"difference": apart(convex / (1 - w[0]), fixed)}


@finding(
    "L2T-Hyena, sampling from the memory",
    "{share:.0%} of the sampling weight is noise: the mean loss of what is drawn is {drawn:+.3f} "
    "deviations from the memory's, without the noise {quiet:+.2f}",
)
def l2t_sampling():
    """Hard sequences are meant to come more often, by softmax(CE/2)/2 + 1/(2n) + 0.1 ε, n = 500.
    But the first two sum to 1, and the noise to 0.05 n."""
    cfg, numbers = l2t.Config(), {}
    ce, uniform = 5 + random(cfg.memory_size), np.random.default_rng(0).random(cfg.memory_size)
    for name, own in (("drawn", cfg), ("quiet", l2t.Config(noise=0.0))):
        p = l2t_memory.sampling_probabilities(ce, uniform, own)
        numbers[name] = float((p @ ce - ce.mean()) / ce.std())
    noise = cfg.noise * uniform.sum()
    return numbers | {"share": float(noise / (1 + noise))}


@finding(
    "L2T-Hyena, losses of the loss network",
    "Huber's loss reaches it {twice:g} times; at the start the gradient of the penalties on w is "
    "{ratio:.2f} times as long as Huber's",
)
def l2t_weight_pressure():
    """Huber's loss stands in the losses of both networks, and one backward of the sum reaches both
    through both. And w has a bonus on its variance and penalties: it would move with no teacher."""
    settings = {}, {"huber_twice": False}, {"huber_reg": 0.0}
    both, once, alone = (_flat(_loss_gradient(l2t.Config(**own))[0]) for own in settings)
    size = np.linalg.norm
    ratio = float(size(alone) / size(both - alone))
    return {"twice": float(size(both - alone) / size(once - alone)), "ratio": ratio}


def _windows(split):
    """Windows at stride 1, each with a token after it"""
    return PTB[split] - WINDOW


@finding(
    "L2T-Hyena, epochs and evaluation at stride 1",
    "PTB: {steps:,} steps an epoch, in which a token comes {times:.1f} times; epoch 3 ends after "
    "{passes:.0f} passes; {little:.0%} of the predictions see fewer than 16 tokens, the mean is "
    "{context:.1f}; windows side by side have that mean, too, from {fewer:.0f} times fewer",
)
def l2t_epochs():
    """Training and evaluation take the window of 64 at every token, and all its positions count. So
    an epoch is as many passes over the text as a window has tokens, and a prediction sees half a
    window on average, its own input included. So it does in windows side by side, the protocol
    "stream": what neither has, and usual figures on this text do, is a long context."""
    steps, seen = _windows("train") // BATCH, np.arange(1, WINDOW + 1)  # by position
    times = steps * BATCH * WINDOW / PTB["train"]
    numbers = {"steps": steps, "times": times, "passes": 3 * times}
    numbers |= {"little": float((seen < 16).mean()), "context": float(seen.mean())}
    return numbers | {"fewer": _windows("valid") // BATCH * BATCH * WINDOW / PTB["valid"]}
