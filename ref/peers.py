"""Other people's implementations, checked as any user's is: `python -m ref verify --peers`.

One Row each: who, which part, the largest error of its outputs and of its gradients, the verdict.
An error is the largest deviation from ours in float64 over the largest magnitude, as in
ref.verify. Where a peer computes in float64 it may be 1e-9; of the two that cast to float32 within
(transformers' and mamba.py's Mamba) it is what verify allows float32.

Layers of PyTorch and AdamW are compared with their pairs in ref.nn and ref.optim; what is a part of
a model goes through ref.cases.verify_callable. The calls of packages are in ref/peer_packages.py;
models that have none have a second form, written from their papers, in ref/peer_twins.py.

A known fault is one of a package's gradients that we can name: it is told, and is no failure.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np

from ref import Error, cases, files, nn
from ref import peer_packages as packages
from ref import peer_twins as twins
from ref.peer_packages import HEADS, LAYERS, VOCABULARY, B, D, L, N
from ref.peer_twins import functional, torch

ALLOWED = 1e-9  # of float64
KINDS = ("out.", "grad.")


@dataclasses.dataclass(frozen=True)
class Row:
    """What came of one peer."""

    who: str  # package and version
    part: str
    forward: float  # the largest error of an output; None: not compared
    gradient: float
    verdict: str  # agrees, differs, known fault, absent
    precision: str = "float64"
    excess: float = None  # the largest error over what is allowed of it
    note: str = ""

    @property
    def ok(self):
        """False where a peer that is there differs, and nobody knew."""
        return self.verdict != "differs"

    def text(self):
        """The line that the command prints"""
        part = self.part if self.precision == "float64" else f"{self.part}, {self.precision}"
        share = ""
        if self.verdict == "agrees" and self.precision != "float64":
            share = f", at {self.excess:.2f} of what is allowed"
        verdict = self.verdict + share + (f": {self.note}" if self.note else "")
        return _line(self.who, part, _number(self.forward), _number(self.gradient), verdict)


@dataclasses.dataclass(frozen=True)
class Peer:
    """One comparison.

    check() -> {"out.*" and "grad.*": (error, error over what is allowed)}, problems
    """

    package: str  # its name on PyPI
    part: str
    check: object
    module: str = ""  # what is imported of it, where that is not `package`
    precision: str = "float64"
    by: str = ""  # who has written it, where that is not the package
    fault: str = ""  # one that is known
    absent: str = ""  # what to say where it is not installed

    def installed(self):
        """Whether it can be imported"""
        return all(map(importlib.util.find_spec, ("torch", self.module or self.package)))

    def row(self):
        """The comparison -> Row, also where the package is absent or fails"""
        who = f"{self.by}, {self.package}" if self.by else self.package
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            who += f" {importlib.metadata.version(self.package)}"
        if not self.installed():
            note = self.absent or f"pip install {self.package}"
            return Row(who, self.part, None, None, "absent", self.precision, None, note)
        try:
            with surroundings():
                errors, problems = self.check()
        except Exception as e:  # a package that has changed is told as one that differs
            errors, problems = {}, [f"{type(e).__name__}: {e}".splitlines()[0]]
        verdict, note = "agrees", ""
        if self.fault and problems and all(text.startswith("grad.") for text in problems):
            verdict, note = "known fault", self.fault
        elif problems:
            verdict, note = "differs", problems[0]
        elif self.fault:
            note = f"it no longer has the fault: {self.fault}"
        worst = [
            _largest(e for n, (e, _) in errors.items() if n.startswith(kind)) for kind in KINDS
        ]
        excess = _largest(e for _, e in errors.values())
        return Row(who, self.part, *worst, verdict, self.precision, excess, note)


def _largest(errors):
    return max((e for e in errors if math.isfinite(e)), default=None)


@contextlib.contextmanager
def surroundings():
    """PyTorch with one thread, whose waiting threads would spin against ours; transformers neither
    fetches nor talks"""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(json_file=None, quiet=False, peers=None):
    """Print the table of peers (all), quiet: only who differs, and the count.

    json_file: where it is written as JSON too; "-": nothing but that is printed.
    -> exit code: 1 where a peer differs.   Error: PyTorch is not installed
    """
    if not importlib.util.find_spec("torch"):
        raise Error("--peers compares through PyTorch, which is not installed (the extra `peers`).")
    table, rows = str(json_file) != "-", []
    if table:
        print(_line("who", "part", "forward", "gradient", "verdict"))
    for peer in PEERS if peers is None else peers:
        rows.append(peer.row())
        if table and not (quiet and rows[-1].ok):
            print(rows[-1].text(), flush=True)
    ok = all(row.ok for row in rows)
    if table:
        print(_closing(rows))
    if json_file:
        own = [dataclasses.asdict(row) | {"ok": row.ok} for row in rows]
        text = json.dumps({"format": "ssm-peers-1", "ok": ok, "peers": own}, allow_nan=False)
        if table:
            files.write_atomically(Path(json_file), f"{text}\n".encode())
        else:
            print(text)
    return int(not ok)


def _closing(rows):
    counts = collections.Counter(row.verdict for row in rows)
    compared = len(rows) - counts["absent"]
    more = {"known fault": "with a known fault", "absent": "not installed"}
    parts = [f"{counts[verdict]} {text}" for verdict, text in more.items() if counts[verdict]]
    return ", ".join([f"{counts['agrees']} of {compared} agree", *parts])


def _line(who, part, forward, gradient, verdict):
    return f"{who:<23} {part:<34} {forward:>8} {gradient:>9}  {verdict}"


def _number(error):
    return "-" if error is None else f"{error:.1e}"


# The two ways of comparing


def part_of(model, part, f, dtype="float64", initial_state=False, **settings):
    """A check of f by verify_callable"""

    def check():
        own = {"d_model": D} | ({"d_state": N} if model in ("longhorn", "mamba") else {}) | settings
        report = cases.verify_callable(
            f, model, part, dtype, own, B=B, L=L, framework="torch", initial_state=initial_state
        )
        errors = {r.tensor: (r.error, r.excess) for r in report.rows if not r.problem}
        problems = [report.problem] if report.problem else []
        problems += [_sentence(row) for row in report.rows if not row.ok]
        if not problems and not any(name.startswith("grad.") for name in errors):
            problems = ["its outputs have no gradients"]
        return errors, problems

    return check


def _sentence(row):
    return f"{row.tensor}: {row.problem or f'error {row.error:.1e}'}"


def pair_of(forward, backward, theirs, *shapes):
    """A check of a pair of ref.nn by autograd, on normal numbers of these shapes"""

    def check():
        rng = np.random.default_rng(0)
        arrays = [rng.standard_normal(shape) for shape in shapes]
        y, cache = forward(*arrays)
        dy = rng.standard_normal(np.shape(y))
        grads = backward(dy, cache)
        grads = grads if isinstance(grads, tuple) else (grads,)
        inputs = [torch.tensor(a, requires_grad=True) for a in arrays]
        out = theirs(*inputs)
        found = {"out.y": (out, y)}
        own = torch.autograd.grad(out, inputs, torch.tensor(dy))
        pairs = zip(own, grads[: len(own)], strict=True)  # ours may have more: of what came before
        found |= {f"grad.{i}": pair for i, pair in enumerate(pairs)}
        return judged({n: (t.detach().numpy(), a) for n, (t, a) in found.items()})

    return check


def values_of(compare):
    """A check of compare() -> {name: (theirs, ours)}"""
    return lambda: judged(compare())


def judged(found):
    """{name: (theirs, ours)} -> errors, problems as of Peer.check"""
    errors, problems = {}, []
    for name, (claim, r) in found.items():
        claim, r = np.asarray(claim), np.asarray(r)
        if claim.shape != r.shape:
            problems.append(f"{name}: has the shape {claim.shape}; expected {r.shape}")
            continue
        error = float(np.abs(claim - r).max() / (np.abs(r).max() or 1.0))
        errors[name] = error, error / ALLOWED
        if not error <= ALLOWED:  # NaN too
            problems.append(f"{name}: error {error:.1e}")
    return errors, problems


# Who is compared


def cross_entropy():
    """Mean over the targets that are not ignored"""
    targets = np.random.default_rng(1).integers(-1, VOCABULARY, (B, L))

    def forward(logits):
        return nn.softmax_cross_entropy_forward(logits, targets)

    def theirs(logits):
        flat = torch.tensor(targets).flatten()
        return functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=-1)

    return pair_of(forward, nn.softmax_cross_entropy_backward, theirs, (B, L, VOCABULARY))()


X, WIDTH = (B, L, D), (D,)
CELL = ((15, 4), (15, 5), (15,), (15,))  # three gates of 5, 4 inputs
LAYERS_OF_TORCH = {
    "layer norm": (
        nn.layer_norm_forward,
        nn.layer_norm_backward,
        lambda x, w, b: functional.layer_norm(x, (D,), w, b),
        *(X, WIDTH, WIDTH),
    ),
    "RMS norm": (
        nn.rms_norm_forward,
        nn.rms_norm_backward,
        lambda x, w: functional.rms_norm(x, (D,), w, 1e-5),
        *(X, WIDTH),
    ),
    "batch norm": (
        lambda x, w, b: nn.batch_norm_forward(x, w, b, None, None, True),
        nn.batch_norm_backward,
        packages.batch_norm,
        *(X, WIDTH, WIDTH),
    ),
    "GELU, erf": (nn.gelu_forward, nn.gelu_backward, lambda x: functional.gelu(x), X),
    "GELU, tanh": (
        nn.gelu_tanh_forward,
        nn.gelu_tanh_backward,
        lambda x: functional.gelu(x, approximate="tanh"),
        X,
    ),
    "SiLU": (nn.silu_forward, nn.silu_backward, lambda x: functional.silu(x), X),
    "softplus": (nn.softplus_forward, nn.softplus_backward, lambda x: functional.softplus(x), X),
    "GLU": (nn.glu_forward, nn.glu_backward, lambda x: functional.glu(x), X),
    "linear": (
        nn.linear_forward,
        nn.linear_backward,
        lambda x, w, b: functional.linear(x, w, b),
        *(X, (7, D), (7,)),
    ),
    "conv1d, depthwise": (
        nn.short_conv_forward,
        nn.short_conv_backward,
        packages.conv1d,
        *(X, (D, 1, 4), WIDTH),
    ),
    "conv1d for the long convolution": (
        nn.fft_conv_forward,
        nn.fft_conv_backward,
        packages.long_conv1d,
        *(X, (D, L)),
    ),
    "GRU": (nn.gru_forward, nn.gru_backward, packages.gru, (B, L, 4), *CELL, (B, 5)),
    "LSTM cell": (
        nn.lstm_cell_forward,
        nn.lstm_cell_backward,
        packages.lstm_cell,
        *((B, 4), (2, B, 5), (20, 4), (20, 5), (20,), (20,)),
    ),
    "Huber loss": (
        partial(nn.huber_forward, delta=0.7),
        nn.huber_backward,
        lambda y, target: functional.huber_loss(y, target, delta=0.7),
        *(X, X),
    ),
}
HEAD = dict(n_heads=HEADS)
LANGUAGE = dict(n_layers=LAYERS, d_input=VOCABULARY, d_output=VOCABULARY, decoder="lm", tied=True)
BOTH = dict(bidirectional=True)
STATE = dict(initial_state=True)
# Parts of models: a name that begins with the model's and the part's -> f, settings
TORCH = {
    "transformer mixer, attention": (packages.attention, HEAD),
    "transformer mixer, both directions": (partial(packages.attention, causal=False), HEAD | BOTH),
    "transformer block, EncoderLayer": (packages.encoder_layer, HEAD),
}
TRANSFORMERS = {
    "transformer block, GPT-2": (packages.gpt2_block, HEAD),
    "transformer network, GPT-2": (packages.gpt2_network, HEAD | LANGUAGE | dict(context=L)),
}
TRANSFORMERS_IN_FLOAT32 = {
    "mamba block": (packages.hf_mamba_block, {}),
    "mamba network": (packages.hf_mamba_network, LANGUAGE | dict(layout="transformers")),
}
MAMBAPY = {
    "mamba scan, parallel": (packages.mambapy_scan, {}),
    "mamba scan, in turn": (partial(packages.mambapy_scan, method="selective_scan_seq"), {}),
}
MAMBAPY_IN_FLOAT32 = {"mamba block": (packages.mambapy_block, {})}
TNN = {
    "tnn operator": (packages.tnn_operator, {}),
    "tnn operator, both directions": (partial(packages.tnn_operator, causal=False), BOTH),
    "tnn block": (packages.tnn_block, {}),
}
TWINS = {
    "hope mixer, circular": (twins.hope_circular_mixer, {}),
    "hope mixer, causal": (twins.hope_causal_mixer, dict(conv="causal")),
    "hope block, both directions": (twins.hope_block, BOTH),
    "s4d mixer": (twins.s4d_mixer, {}),
    "s4d block, both directions": (twins.s4d_block, BOTH),
    "s4 mixer": (twins.s4_mixer, {}),
    "s4 block, both directions": (twins.s4_block, BOTH),
    "hyena mixer, order 3": (twins.hyena_mixer, dict(order=3)),
    "hyena block": (twins.hyena_block, {}),
    "l2t-student mixer": (twins.student_mixer, {}),
    "tnn operator, causal": (twins.tnn_operator, {}),
    "tnn operator, both directions": (partial(twins.tnn_operator, causal=False), BOTH),
    "tnn operator, learned decay": (
        partial(twins.tnn_operator, least=0.9),
        dict(use_multi_decay=True, gamma=0.9),
    ),
    "tnn block, fixed decay": (twins.tnn_block, dict(use_decay=True, gamma=0.9)),
    "longhorn scan": (twins.longhorn_scan, STATE),
    "longhorn scan, exact update": (
        partial(twins.longhorn_scan, step=twins.exact_step),
        dict(update="exact") | STATE,
    ),
    "longhorn block": (twins.longhorn_block, {}),
    "mamba scan": (twins.mamba_scan, STATE),
    "mamba mixer": (twins.mamba_mixer, {}),
}
NO_CONJUGATE = "of complex A its gradients lack the conjugate; real A, Mamba's, is right"
EMPTY = "PyPI's 0.0.0 to 0.0.5 are empty; the code is github.com/Doraemonzzz/tnn-pytorch"


def _parts(package, table, precision="float64", **more):
    """A Peer for each part of a model"""
    return [
        Peer(
            *(package, name, part_of(*name.partition(",")[0].split(), f, precision, **own)),
            precision=precision,
            **more,
        )
        for name, (f, own) in table.items()
    ]


PEERS = [
    *(Peer("torch", name, pair_of(*own)) for name, own in LAYERS_OF_TORCH.items()),
    Peer("torch", "cross-entropy", cross_entropy),
    Peer("torch", "batch norm, running moments", values_of(packages.running_moments)),
    Peer("torch", "AdamW", values_of(packages.adamw)),
    Peer("torch", "clipping of the gradient's norm", values_of(packages.clipping)),
    *_parts("torch", TORCH),
    *_parts("transformers", TRANSFORMERS),
    *_parts("transformers", TRANSFORMERS_IN_FLOAT32, "float32"),
    *_parts("mambapy", MAMBAPY),
    *_parts("mambapy", MAMBAPY_IN_FLOAT32, "float32"),
    Peer(
        *("mambapy", "parallel scan, complex A", values_of(packages.mambapy_complex)),
        fault=NO_CONJUGATE,
    ),
    *_parts("tnn-pytorch", TNN, module="tnn_pytorch", absent=EMPTY),
    *_parts("torch", TWINS, by="paper"),
]
