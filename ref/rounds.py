"""Learning to teach in rounds: a loss network learns through the student's steps. arXiv 2310.19313.

A round, from the student θ_0 and its optimiser, with K batches and one held-out batch:

    1  K steps on the loss under φ; E(φ), the held-out cross-entropy of θ_K, and G = dE/dφ: ref.hvp
    2  φ' = φ - a step of Adam or SGD along G (hypergrad), or the LSTM's: ref.l2t_unrolled (6-8)
    3  the same K steps under φ', with the same batches and dropout, which the student keeps
    4  lstm: dE(φ')/dψ, ref.l2t_unrolled (9), and a step of Adam on ψ

The loss is ref.l2t (5), with weights by φ from the features of the batch, or ref.l2t_unrolled (2).
H v and C v are exact where the student has them (ref.tangents), else differences of its gradients.
With constant features (3) of ref.l2t_hypergrad holds: C v is one backward of the loss network.

With --inner sgd or momentum, step 1 goes other ways than the student's AdamW, which makes its own K
steps in 3. --commit first keeps the steps under φ and needs no 3, except for 4.

Decided here, where neither paper says it: Adam's rates, of ψ and of φ, fall by the released code's
cosine, and update_scale is constant; the held-out batch is drawn anew for each round; dropout is on
in the steps and off in E, for which a batch norm's running moments are constants; of the M rounds
before a step on ψ the last J count: ψ is the same in them, so they are gone through again.
"""

import math
from dataclasses import replace

import numpy as np

from ref import (
    Error,
    hvp,
    l2t,
    l2t_hypergrad,
    l2t_unrolled,
    network,
    nn,
    optim,
    tangents,
    teaching,
)
from ref.backend import item


class Rounds:
    """--teacher hypergrad and lstm."""

    in_rounds = True

    def __init__(self, cfg, cfg_network, groups, recipe, draw, seed, dtype):
        """groups: name -> optim.Group of the student;  draw(rng) -> a held-out batch

        Error: exact products of a student, or of features, that have none
        """
        trained = {name: group for name, group in groups.items() if group.lr}
        self.cfg, self.cfg_network, self.trained, self.seed = cfg, cfg_network, trained, seed
        self.draw, self.steps, clip = draw, cfg.inner_steps, recipe.clip or None
        self.adamw = hvp.Optimiser("adamw", groups=trained, clip=clip)
        if cfg.inner.startswith("adamw"):
            self.inner = replace(self.adamw, kind=cfg.inner)
        else:
            one = optim.Group(cfg.inner_lr or recipe.lr)
            self.inner = hvp.Optimiser(cfg.inner, one, momentum=cfg.inner_momentum, clip=clip)
        self.pairs = cfg.dln == "pairs"
        self.exact = self._exact()
        rng = np.random.default_rng([seed, 0, teaching.MEMORY])
        self.state = {"dln": self._loss_network(rng, dtype)}
        if cfg.teacher == "lstm":
            sizes = l2t_unrolled.Config(
                hidden=cfg.lstm_size, cells=cfg.lstm_cells, p=cfg.lstm_p, head=cfg.lstm_head
            )
            self.state["teacher"] = l2t_unrolled.teacher_init(sizes, rng, dtype)
        self.state |= {f"{name}_moments": optim.adamw_init(p) for name, p in self.state.items()}
        self.state["rounds"] = 0
        if cfg.teacher == "lstm":
            size = sum(p.size for p in self.state["dln"].values())
            cells = l2t_unrolled.teacher_state(self.state["teacher"], size)
            cells = {str(i): cell for i, cell in enumerate(cells)}
            inputs = np.zeros((cfg.truncation, size), dtype)
            self.state |= {"cells": cells, "before": dict(cells), "inputs": inputs}

    def __str__(self):
        cfg, count = self.cfg, sum(p.size for p in self.state["dln"].values())
        kind = "pairs of classes" if self.pairs else f"features, {cfg.features}"
        products = "exact" if self.exact else "by differences"
        text = f"{cfg.teacher}: loss network of {count:,} parameters ({kind}), K = {self.steps}, "
        text += f"{cfg.inner} inside, second derivatives {products}"
        if cfg.teacher == "lstm":
            count = sum(p.size for p in self.state["teacher"].values())
            text += f"; LSTM of {count:,} parameters"
        return text

    def _exact(self):
        """Whether the products are exact.   Error: they cannot be, and have to"""
        cfg, reason = self.cfg, None
        if not (self.pairs or cfg.detach):
            reason = "features that are no constants (--no-detach) have no exact products; use "
            reason += "--hvp differences."
        else:
            try:
                tangents.check(self.cfg_network)
            except Error as e:
                reason = str(e)
        if reason and cfg.hvp == "exact":
            raise Error(f"--hvp exact: {reason}")
        return cfg.hvp != "differences" and reason is None

    def _loss_network(self, rng, dtype):
        cfg, V = self.cfg, self.cfg_network.d_output
        if not self.pairs:
            return l2t.dln_init(cfg, rng, dtype)
        if V > MOST_CLASSES:
            raise Error(
                f"--dln pairs goes through every class of every target, and there are {V:,}; use "
                "--dln weights."
            )
        sizes = l2t_unrolled.Config(dln_hidden=cfg.pair_size, dln_layers=cfg.pair_layers)
        return l2t_unrolled.dln_init(sizes, rng, dtype)

    # The student's loss under φ

    def _forward(self, theta, batch, step):
        """-> logits (B, S, V), targets (B, S), the network's cache"""
        rng = np.random.default_rng([self.seed, step])
        logits, targets, cache = network.predict(theta, batch, self.cfg_network, rng)
        by_sequence = teaching.by_sequence(logits, targets, len(batch.targets))
        return *by_sequence, (cache, logits.shape)

    def _backward(self, theta, dlogits, dsquare, cache):
        """-> ∂l/∂θ of what is trained"""
        cache, shape = cache
        _, grads = network.backward(dlogits.reshape(shape), cache)
        grads = {name: grads[name] for name in self.trained if name in grads}
        if self.cfg.regulariser == "weights":
            grads = {name: g + 2 * dsquare * theta[name] for name, g in grads.items()}
        return grads

    def _square(self, theta):
        if self.cfg.regulariser == "weights":
            return teaching.square_norm(theta, self.trained)
        return None

    def _weights(self, phi, z, y, step, features, summary):
        """-> w, the caches of the loss network and of the features"""
        F, made = features, None
        if features is None:
            F, made = l2t.features_forward(z, y, self.cfg, summary)
        rng = np.random.default_rng([self.seed, step, teaching.DROPOUT])
        w, loss_network = l2t.dln_forward(phi, F, self.cfg, rng)
        return w, (loss_network, made)

    def _loss(self, theta, phi, batch, step, features=None, w=None, backward=True):
        """-> ∂l/∂θ, ∂l/∂φ, numbers to log, network's cache

        features: constants instead of the batch's own;  w: constants in the place of φ's weights,
        then ∂l/∂w stands in the place of ∂l/∂φ;  without backward ∂l/∂θ is {}
        """
        z, y, cache = self._forward(theta, batch, step)
        if self.pairs:
            loss, pair = l2t_unrolled.pair_loss_forward(phi, *_rows(z, y))
            dlogits, dphi = l2t_unrolled.pair_loss_backward(1.0, pair)
            return self._backward(theta, dlogits, 0.0, cache), dphi, (loss, z, y, None, None), cache
        own, summary = None, l2t.summarise(z, y, self.cfg, w is None and features is None)
        if w is None:
            w, own = self._weights(phi, z, y, step, features, summary)
        given = w, self.cfg, self._square(theta), summary
        loss, parts, mixed = l2t.student_loss_forward(z, y, *given)
        dlogits, dw, dsquare = l2t.student_loss_backward(1.0, mixed)
        dphi = {"w": dw}
        if own is not None and not self.cfg.detach:
            loss_network, made = own
            dF, dphi = l2t.dln_backward(dw, loss_network)
            if made is not None:
                dlogits = dlogits + l2t.features_backward(dF, made)
        dtheta = self._backward(theta, dlogits, dsquare, cache) if backward else {}
        return dtheta, dphi, (loss, z, y, parts, w), cache

    def _products(self, theta, phi, batch, step, v, features=None, hessian=True):
        """v like the trained part of θ -> H v ({} unless hessian), C v"""
        if self.exact:
            return self._exact_products(theta, phi, batch, step, v, features, hessian)
        h = self.cfg.hvp_step or None
        if self.pairs or not self.cfg.detach:
            return hvp.central_differences(
                lambda moved: self._loss(moved, phi, batch, step, features)[:2], theta, v, h
            )
        z, y, _ = self._forward(theta, batch, step)
        summary = l2t.summarise(z, y, self.cfg, features is None)
        w, (loss_network, _) = self._weights(phi, z, y, step, features, summary)
        H, of = hvp.central_differences(
            lambda moved: self._loss(moved, phi, batch, step, w=w, backward=hessian)[:2],
            theta,
            v,
            h,
        )
        return H, l2t.dln_backward(of["w"], loss_network)[1]

    def _exact_products(self, theta, phi, batch, step, v, features, hessian):
        """The same by ref.tangents"""
        z, y, (cache, shape) = self._forward(theta, batch, step)
        dz, along = tangents.forward(v, cache)
        dz = dz.reshape(z.shape)
        dsquare = along_square = 0.0
        if self.pairs:
            _, pair = l2t_unrolled.pair_loss_forward(phi, *_rows(z, y))
            dlogits, _ = l2t_unrolled.pair_loss_backward(1.0, pair)
            of_logits, C = l2t_unrolled.pair_loss_tangent(_rows(dz, y)[0], pair)
        else:
            summary = l2t.summarise(z, y, self.cfg, features is None)
            w, (loss_network, _) = self._weights(phi, z, y, step, features, summary)
            given = w, self.cfg, self._square(theta), summary
            _, _, mixed = l2t.student_loss_forward(z, y, *given)
            dlogits, _, dsquare = l2t.student_loss_backward(1.0, mixed)
            if self.cfg.regulariser == "weights":
                along_square = 2 * hvp.inner(theta, v)
            of_logits, of_w = l2t_hypergrad.student_loss_tangent(dz, mixed, along_square)
            C = l2t.dln_backward(of_w, loss_network)[1]
        if not hessian:
            return {}, C
        H = tangents.backward(dlogits.reshape(shape), of_logits.reshape(shape), cache, along)
        H = {name: H[name] for name in v}
        if self.cfg.regulariser == "weights":
            H = {name: h + 2 * dsquare * v[name] for name, h in H.items()}
        return H, C

    # The student's steps

    def roll_out(self, theta, moments, phi, batches, first, scale, held_out, features=None):
        """Steps 1 and 2 of a round.   -> E, G, θ_K, moments_K, lines to log, and the cosine between
        ∂E/∂θ_K and the last gradient

        scale(step) -> factor on the student's rates;  features: constants, one of each batch
        """
        inner, walked = self.inner, self._walk(phi, batches, first, features)
        own = moments if inner.kind.startswith("adamw") else None
        passed = first - 1 if inner.kind.startswith("adamw") else 0
        theta, moments, tape = hvp.unroll(
            theta, len(batches), walked.gradient, inner, own, passed, lambda k: scale(first + k)
        )
        E, v = self.held_out_gradient(theta | walked.running, held_out)

        def products(k, theta, v):
            given = None if features is None else features[k]
            own = batches[k], first + k, v, given
            return self._products(theta, phi, *own, hessian=k > 0)  # H v of the first is not used

        G, _ = hvp.hypergradient(v, tape, *hvp.callbacks(products))
        size = math.sqrt(hvp.inner(v, v) * hvp.inner(tape.gradients[-1], tape.gradients[-1]))
        cosine = hvp.inner(tape.gradients[-1], v) / size if size else 0.0
        return E, G, theta | walked.running, moments, walked.lines, cosine

    def commit(self, theta, moments, phi, batches, first, scale):
        """The student's own steps under φ.   -> θ_K, moments_K, lines to log"""
        walked = self._walk(phi, batches, first)
        for k in range(len(batches)):
            g = walked.gradient(k, theta)
            rate = scale(first + k)
            theta, moments, _ = hvp.step_forward(theta, moments, g, first + k, rate, self.adamw)
        return theta | walked.running, moments, walked.lines

    def _walk(self, phi, batches, first, features=None):
        return _Walk(self, phi, batches, first, features)

    def held_out_gradient(self, theta, batch):
        """-> the batch's cross-entropy without dropout, its gradient in what is trained"""
        logits, targets, cache = network.predict(theta, batch, self.cfg_network)
        loss, own = nn.softmax_cross_entropy_forward(logits, targets, consume_logits=True)
        _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, own), cache)
        return item(loss), {name: g for name, g in grads.items() if name in self.trained}

    # A round

    def round(self, params, moments, batches, first, total, scale):
        """-> params, moments, a dict of numbers to log for each step

        batches of the steps from `first` on, of `total`;  scale(step): factor on the rates
        """
        held_out = self.draw(np.random.default_rng([self.seed, first, teaching.HELD_OUT]))
        own = params, moments
        second = self.cfg.commit == "second"
        E, G, *kept, lines, cosine = self.roll_out(
            *own, self.state["dln"], batches, first, scale, held_out
        )
        if second or not self.inner.kind.startswith("adamw"):
            kept = lines = None  # and their memory
        norm, after = self._update(G, first, total)
        values = {"dln_loss": E, "hypergradient_norm": norm, "alignment": cosine}
        done = self.state["rounds"] + 1
        teaches = self.cfg.teacher == "lstm" and done % self.cfg.teacher_every == 0
        if teaches:
            again = self.roll_out(*own, after, batches, first, scale, held_out)
            self._teach(again[1], first, total)
            values["teacher_loss"] = again[0]
            if second:
                *kept, lines = again[2:5]
        if not self.inner.kind.startswith("adamw") or (second and not teaches):
            phi = after if second else self.state["dln"]
            *kept, lines = self.commit(*own, phi, batches, first, scale)
        self.state |= {"dln": after, "rounds": done}
        for line in lines:
            line |= values
        return *kept, lines

    def _update(self, G, step, total):
        """-> |G|, φ'"""
        cfg, phi = self.cfg, {name: p.copy() for name, p in self.state["dln"].items()}
        if cfg.teacher == "lstm":
            return optim.gradient_norm(G), self._lstm(G)
        if cfg.dln_optimiser == "sgd":
            u = l2t_unrolled.flatten(G)
            return optim.gradient_norm(G), l2t_unrolled.moved(phi, u, cfg.update_scale)
        rate = cfg.dln_lr * teaching.factor(cfg, step, total)
        number, unused = self.state["rounds"] + 1, () if self.pairs else l2t.left_out(cfg, True)
        G = {name: g for name, g in G.items() if name not in unused}
        norm = teaching.adamw(
            phi, G, self.state["dln_moments"], number, rate, cfg.dln_weight_decay, cfg.dln_clip
        )
        return norm, phi

    def _lstm(self, G):
        """φ' of the LSTM, and its state after; inputs and the state before are kept"""
        state, J, M = self.state, self.cfg.truncation, self.cfg.teacher_every
        place = state["rounds"] % M - (M - J)  # among the last J before a step on ψ
        cells, g = _ordered(state["cells"]), l2t_unrolled.flatten(G)
        if place == 0:
            state["before"] = dict(state["cells"])
        if place >= 0:
            state["inputs"] = state["inputs"].copy()
            state["inputs"][place] = g
        own = state["teacher"], g, cells, self.cfg.lstm_p
        u, after, _ = l2t_unrolled.teacher_forward(*own)
        state["cells"] = {str(i): cell for i, cell in enumerate(after)}
        return l2t_unrolled.moved(state["dln"], u, self.cfg.update_scale)

    def _teach(self, G, step, total):
        """A step of Adam on ψ; G = dE/dφ at φ'"""
        cfg, state = self.cfg, self.state
        grads = self.teacher_gradient(G)
        rate = cfg.teacher_lr * teaching.factor(cfg, step, total)
        number = (state["rounds"] + 1) // cfg.teacher_every
        state["teacher"] = {name: p.copy() for name, p in state["teacher"].items()}
        decay, largest = cfg.teacher_weight_decay, cfg.teacher_clip
        own = state["teacher"], grads, state["teacher_moments"], number
        teaching.adamw(*own, rate, decay, largest)

    def teacher_gradient(self, G):
        """dE(φ')/dψ through the last J updates, G = dE/dφ at φ'"""
        cells, caches = _ordered(self.state["before"]), []
        for g in self.state["inputs"]:
            own = self.state["teacher"], g, cells, self.cfg.lstm_p
            _, cells, cache = l2t_unrolled.teacher_forward(*own)
            caches.append(cache)
        du, dstate, grads = -self.cfg.update_scale * l2t_unrolled.flatten(G), None, None
        for cache in reversed(caches):
            # φ' has the sum of all updates since: each of them has the same derivative
            own, dstate = l2t_unrolled.teacher_backward(du, dstate, cache)
            grads = own if grads is None else {name: g + own[name] for name, g in grads.items()}
        return grads


class _Walk:
    """The gradients of K steps, and what is to be logged of them."""

    def __init__(self, rounds, phi, batches, first, features):
        self.of, self.phi, self.batches, self.first = rounds, phi, batches, first
        self.features, self.lines, self.running = features, [], {}

    def gradient(self, k, theta):
        """∂l/∂θ of step k"""
        given = None if self.features is None else self.features[k]
        own = self.batches[k], self.first + k, given
        grads, _, seen, cache = self.of._loss(theta, self.phi, *own)
        self.running |= network.running_statistics(theta | self.running, cache[0])
        self.lines.append(self._line(grads, *seen))
        return grads

    def _line(self, grads, loss, z, y, parts, w):
        line = {"gradient_norm": optim.gradient_norm(grads)}
        if w is None:
            line |= {"weighted_loss": item(loss), "accuracy": teaching.correct(z, y)}
            ce, _ = nn.softmax_cross_entropy_forward(z, y, consume_logits=True)
            return line | {"loss": item(ce)}
        ce, reg = parts
        values = {"loss": loss, "ce": ce, "reg": reg, "live_weight": w}
        return line | teaching.mixture_numbers(z, y, values, self.of.cfg)


def _rows(z, y):
    """(B, S, V), (B, S) -> (B S, V), (B S,)"""
    return z.reshape(-1, z.shape[2]), y.reshape(-1)


def _ordered(cells):
    return [cells[str(i)] for i in range(len(cells))]


MOST_CLASSES = 1000  # of the loss network by pairs
