"""Functions of other packages: arrays to NumPy and back, calls, derivatives.

A function gets the arrays of a case in its own package's type and in the case's precision, and
gives back outputs, or outputs and a function for their gradients. What it gives comes back by
DLPack, as NumPy arrays; bfloat16, which DLPack has and NumPy has not, as its 16 bits.
"""

import contextlib
import importlib
import os
import sys
import traceback
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from ref import Error
from ref.backend import check_choice

FRAMEWORKS = ("numpy", "torch", "cupy", "jax")  # of PyTorch also a device: torch:cuda
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass
class Outcome:
    """What a function gave: arrays by the names of a case, a sentence for each that is none."""

    claims: dict = field(default_factory=dict)  # out.*, grad.* -> array
    problems: dict = field(default_factory=dict)  # out.*, grad.*, backward -> sentence
    notes: list = field(default_factory=list)
    failed: str = ""  # why there is nothing at all
    backward: bool = False  # whether there are gradients, or should be


def imported(spec):
    """The function that module:name says, of the working folder or installed.   Error: none"""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise Error(f"--callable {spec}: expected MODULE:FUNCTION, such as my_module:my_scan.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        f = importlib.import_module(module)
    except (Exception, SystemExit) as e:
        raise Error(f"--callable {spec}: importing it raised {_last_line(e)}.") from e
    for part in name.split("."):
        if not hasattr(f, part):
            raise Error(f"--callable {spec}: {module} has no {name}.")
        f = getattr(f, part)
    if not callable(f):
        raise Error(f"--callable {spec}: {name} is {_kind(f)}; expected a function.")
    return f


def check(framework):
    """Error: an unknown framework, or one that is not installed"""
    name = framework.partition(":")[0]
    check_choice("framework", name, FRAMEWORKS)
    if ":" in framework and name != "torch":
        raise Error(f"framework={framework!r}: only torch takes a device, such as torch:cuda.")
    try:
        importlib.import_module(name)
    except Exception as e:
        raise Error(f"framework={name!r} cannot be imported: {_last_line(e)}.") from e


def sent(a, framework):
    """A fresh array of the framework from a NumPy array.   Error: it has no such type or device"""
    name, _, device = framework.partition(":")
    a = np.array(a, order="C")
    try:
        if name == "torch":
            import torch

            bits = a.view(np.int16) if a.dtype == BFLOAT16 else a
            t = torch.from_numpy(bits)
            t = t.view(torch.bfloat16) if a.dtype == BFLOAT16 else t
            return t.to(device) if device else t
        if name in ("cupy", "jax"):
            package = importlib.import_module({"jax": "jax.numpy"}.get(name, name))
            return package.asarray(a)
    except Exception as e:
        raise Error(f"{framework} takes no array of {a.dtype.name} here: {_last_line(e)}.") from e
    return a


def received(x):
    """Any package's array as a NumPy array.   Error: it is none"""
    try:
        if isinstance(x, (np.ndarray, np.generic, float, int)):
            return np.asarray(x)
        if type(x).__module__.partition(".")[0] == "torch":
            return _from_torch(x)
        if hasattr(x, "get") and hasattr(x, "__cuda_array_interface__"):
            return x.get()
        if type(x).__module__.startswith("jax") or not hasattr(x, "__dlpack__"):
            if not hasattr(x, "__array__"):
                raise Error(f"is {_kind(x)}; expected an array")
            return np.asarray(x)
        return np.from_dlpack(x)
    except Error:
        raise
    except Exception as e:
        raise Error(f"is {_kind(x)} that cannot be read: {_last_line(e)}") from e


def _from_torch(x):
    x = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if str(x.dtype) != "torch.bfloat16":
        return np.from_dlpack(x)
    return np.from_dlpack(x.view(sys.modules["torch"].int16)).view(BFLOAT16)


def _kind(x):
    name = type(x).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _last_line(e):
    """An exception as Python's last line about it, without the full stop, and where it was"""
    text = " ".join(traceback.format_exception_only(e)[-1].split()).rstrip(".")
    ours, installed = os.path.dirname(__file__), ("site-packages", "dist-packages", "<frozen")
    for frame in reversed(traceback.extract_tb(e.__traceback__)):
        theirs = frame.filename.startswith(ours) or any(n in frame.filename for n in installed)
        if not theirs and os.path.dirname(os.__file__) not in frame.filename:
            return f"{text} ({os.path.basename(frame.filename)}, line {frame.lineno})"
    return text or type(e).__name__


# Calling


def called(f, case, framework, douts, aliases, only, own=False):
    """Call f with a case's inputs and parameters, and, where it can be, for its gradients.

    douts: {output: its gradient, an array}; aliases: {param.*: the other name of the same tensor};
    only: the name of an output that comes alone, or None; own: f takes (params, **inputs).
    -> Outcome
    """
    sources = {n: t for n, t in case.tensors.items() if n.startswith(("in.", "param."))}
    call = _Call(f, case.part, own, framework, sources, aliases, only)
    differentiate = {"torch": _by_autograd, "jax": _by_vjp}.get(framework.partition(":")[0])
    outcome = Outcome()
    precise = case.precision == "float64" and framework == "jax"
    with _jax_in_float64() if precise else contextlib.nullcontext():
        result = call.run(outcome, leaves=framework.startswith("torch"))
        if outcome.failed:
            return outcome
        outputs, backward = result
        for name, x in outputs.items():
            _receive(outcome, f"out.{name}", x)
        if backward is not None:
            _by_backward(outcome, call, backward, douts)
        elif differentiate and douts:
            differentiate(outcome, call, outputs, douts)
        if not outcome.backward:
            why = "f gave outputs without a function for their gradients"
            outcome.notes.append(f"checked forward only: {why}")
    return outcome


class _Call:
    """f and what it is called with"""

    def __init__(self, f, part, own, framework, sources, aliases, only):
        self.f, self.part, self.own, self.framework = f, part, own, framework
        self.aliases = {n: other for n, other in aliases.items() if n in sources}
        self.sources = {n: t for n, t in sources.items() if n not in self.aliases}
        self.only = only
        self.arrays = {}

    def send(self, leaves=False):
        """Fresh arrays of all sources; of PyTorch ones that gradients are taken of"""
        self.arrays = {n: sent(t, self.framework) for n, t in self.sources.items()}
        for name in self.differentiable() if leaves else ():
            self.arrays[name].requires_grad_()

    def differentiable(self):
        """Names of the sources that are no integers"""
        return [n for n, t in self.sources.items() if t.dtype.kind not in "iub"]

    def __call__(self, arrays):
        """f of these arrays"""
        arrays = arrays | {name: arrays[other] for name, other in self.aliases.items()}
        inputs = {n[3:]: a for n, a in arrays.items() if n.startswith("in.")}
        params = {n[6:]: a for n, a in arrays.items() if n.startswith("param.")}
        if self.part == "scan":
            return self.f(**inputs)
        if self.own or "x" not in inputs:
            return self.f(params, **inputs)
        state = {n[6:]: inputs.pop(n) for n in list(inputs) if n.startswith("state.")}
        given = {"state": state} if state else {}
        return self.f(params, inputs.pop("x"), **inputs, **given)

    def run(self, outcome, leaves):
        """-> outputs by name, f's own backward or None; nothing where outcome.failed says why"""
        self.send(leaves)
        try:
            result = self(self.arrays)
        except (Exception, SystemExit) as e:
            if leaves:  # it may not work on tensors that want gradients
                return self.run(outcome, leaves=False)
            outcome.failed = f"f raised {_last_line(e)}."
            return None
        backward = None
        if isinstance(result, tuple) and len(result) == 2 and callable(result[1]):
            result, backward = result
        if isinstance(result, tuple) and len(result) == 2:
            kind = _kind(result[1])
            outcome.failed = f"f's second result is {kind}; expected a function for the gradients."
            return None
        if isinstance(result, dict):
            return {str(name): x for name, x in result.items()}, backward
        if isinstance(result, (tuple, list)) or result is None or not self.only:
            expected = f"{self.only}, a dict" if self.only else "a dict"
            outcome.failed = (
                f"f gave {_kind(result)}; expected {expected} of outputs by name, or two things: "
                "that and a function for the gradients."
            )
            return None
        return {self.only: result}, backward

    def named(self, name):
        """The case's name of the gradient of an argument of f"""
        return next((f"grad.{k}{name}" for k in ("in.", "param.") if k + name in self.known), "")

    @property
    def known(self):
        """Names of all sources"""
        return {*self.sources, *self.aliases}


def _receive(outcome, name, x):
    try:
        outcome.claims[name] = received(x)
    except Error as e:
        outcome.problems[name] = str(e)


def _by_backward(outcome, call, backward, douts):
    """The gradients that f's own function gives"""
    outcome.backward = True
    given = {name: sent(dout, call.framework) for name, dout in douts.items()}
    try:
        grads = backward(given[call.only] if [*given] == [call.only] else given)
    except Exception as e:
        outcome.problems["backward"] = f"it raised {_last_line(e)}"
        return
    if not isinstance(grads, dict):
        outcome.problems["backward"] = f"it gave {_kind(grads)}; expected a dict by argument"
        return
    for name, g in grads.items():
        whole = call.named(name)
        if not whole:
            known = ", ".join(sorted(n.partition(".")[2] for n in call.known))
            outcome.problems[f"grad.{name}"] = f"f has no argument of this name; it has {known}"
        elif g is not None:
            _receive(outcome, whole, g)


def _by_autograd(outcome, call, outputs, douts):
    """PyTorch's gradients of outputs that have them"""
    import torch

    traced = {n: outputs[n] for n in douts if getattr(outputs.get(n), "grad_fn", None) is not None}
    if not traced or _other_shapes(outcome, traced, douts):
        return
    outcome.backward = True
    leaves = call.differentiable()
    given = [sent(douts[n], call.framework).to(y.device, y.dtype) for n, y in traced.items()]
    try:
        grads = torch.autograd.grad(
            [*traced.values()], [call.arrays[n] for n in leaves], given, allow_unused=True
        )
    except Exception as e:
        outcome.problems["backward"] = f"PyTorch raised {_last_line(e)}"
        return
    _collect(outcome, call, dict(zip(leaves, grads, strict=True)))


def _by_vjp(outcome, call, outputs, douts):
    """JAX's gradients"""
    import jax

    wanted = [n for n in douts if n in outputs]
    if not wanted or _other_shapes(outcome, outputs, douts):
        return
    floats = {n: call.arrays[n] for n in call.differentiable()}

    def of_floats(floats):
        result = call(call.arrays | floats)
        result = result if isinstance(result, dict) else {call.only: result}
        return {n: result[n] for n in wanted}

    try:
        y, vjp = jax.vjp(of_floats, floats)
        given = {n: sent(douts[n], call.framework).astype(y[n].dtype) for n in wanted}
        (grads,) = vjp(given)
    except NotImplementedError as e:
        outcome.notes.append(f"JAX has no derivative: {_last_line(e)}")
        return
    except Exception as e:
        outcome.backward = True
        outcome.problems["backward"] = f"jax.vjp raised {_last_line(e)}"
        return
    outcome.backward = True
    _collect(outcome, call, grads)


def _collect(outcome, call, grads):
    """Gradients by source, of a tied parameter under both of its names"""
    grads = grads | {name: grads[other] for name, other in call.aliases.items()}
    for name, g in grads.items():
        if g is not None:
            _receive(outcome, f"grad.{name}", g)


def _other_shapes(outcome, outputs, douts):
    """Whether an output cannot take its gradient, which is then noted"""
    for name, dout in douts.items():
        if name in outputs and tuple(outputs[name].shape) != dout.shape:
            outcome.notes.append(f"no gradients: {name} has another shape than its gradient")
            return True
    return False


@contextlib.contextmanager
def _jax_in_float64():
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
