"""`python -m ref bench`: times and memory as ratios against another implementation, interleaved in
one process.

Every figure is the median of several rounds in which the candidates run in turn. The base of the
ratios is the fastest candidate of the other library; without one, the first of ours. Memory is how
far the peak of a fresh process rises above what it holds before the call.

A model's benchmarks are one entry of BENCHES, title -> make. make(xp, against, small) returns two
dicts, name -> call: ours and theirs; their layers are in tests/torch_twins.py.
"""

import functools
import importlib
import importlib.util
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from ref import Error, backend, hope, network, transformer

ROUNDS = 9
PAUSE = 0.05  # seconds before each call: idle threads of the candidate before it spin for a while
PEERS = Path(__file__).parents[1] / "tests" / "torch_twins.py"
STEPS = 64  # of a decoding call


def environment(xp, against):
    """One line that a ratio must name: device, or threads, BLAS core type, allocator; versions"""
    versions = f"numpy {np.__version__}"
    if against:
        versions += f", {against} {_torch().__version__}"
    if xp is not np:
        return f"{backend.device_name(xp)}, {xp.__name__} {xp.__version__}, {versions}"
    core = backend.blas_core()
    malloc = "malloc keeps freed memory (for all candidates)"
    return f"{backend.threads()} threads, BLAS core type {core}, {malloc}, {versions}"


def run(models, against, rounds=ROUNDS, device="cpu"):
    """Print one table per benchmark of the models; against: torch or None; device as in train.py"""
    xp = backend.select_device(device)
    if against:
        _twins()
    print(environment(xp, against))
    for model in models:
        if model not in BENCHES:
            print(f"\n{model}: there is no benchmark of it")
        for title, make in BENCHES.get(model, {}).items():
            print(f"\n{title}")
            ours, theirs = make(xp, against)
            times = interleaved(theirs | ours, rounds, xp)
            on_host = xp is np and os.path.exists("/proc/self/clear_refs")  # else no peak is known
            peaks = {name: peak(make, name, against) if on_host else 0 for name in times}
            base = min(theirs or list(ours)[:1], key=lambda name: np.median(times[name]))
            for name in times:
                print(line(name, base, times, peaks))


def line(name, base, times, peaks):
    """A candidate's row: median time, its spread, peak memory, and both over those of the base"""
    t = 1e3 * np.array(times[name])
    row = f"    {name:42} {np.median(t):9.2f} ms [{t.min():.2f} to {t.max():.2f}]"
    row += f"  {peaks[name] / 2**20:8.1f} MiB" if any(peaks.values()) else ""
    if name == base:
        return row + "   the base of the ratios"
    row += f"   time x {np.median(t / (1e3 * np.array(times[base]))):.3f}"
    return row + (f", memory x {peaks[name] / peaks[base]:.3f}" if peaks[base] else "")


def interleaved(calls, rounds, xp):
    """name -> seconds of each round, the calls in turn, after two rounds that do not count"""
    times = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            backend.synchronize(xp)
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            backend.synchronize(xp)
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def peak(make, name, against):
    """Bytes that one call adds to the peak of a fresh process that has compiled it before."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (make, name, against))


def _peak(make, name, against):
    ours, theirs = make(np, against, small=True)
    (theirs | ours)[name]()
    ours, theirs = make(np, against)
    call = (theirs | ours)[name]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


# The other library; nothing else in the project knows it


@functools.cache
def _torch():
    """PyTorch, on as many threads as ours.   Error: it is not installed"""
    try:
        torch = importlib.import_module("torch")
    except ImportError as e:
        raise Error("--against torch: it is not installed (the extra `peers`).") from e
    torch.set_num_threads(backend.threads())
    return torch


@functools.cache
def _twins():
    """The module of PyTorch's forms.   Error: only a checkout of the repository has its file"""
    _torch()
    if not PEERS.is_file():
        raise Error(
            f"--against torch: {PEERS} is missing; its layers are not installed with the package, "
            "so run this in a checkout of the repository."
        )
    spec = importlib.util.spec_from_file_location("torch_twins", PEERS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tensors(arrays, grad):
    """Copies of the arrays, dict or tuple; grad: gradients are asked for"""
    torch = _torch()
    if isinstance(arrays, dict):
        return dict(zip(arrays, _tensors(arrays.values(), grad), strict=True))
    return [torch.from_dlpack(a).clone().requires_grad_(grad) for a in arrays]


def _their_mixer(name, params, x, dy, **form):
    """A call of the mixer `name` of tests/torch_twins.py, which has channels first, on our arrays
    x, dy (B, L, D); dy None: forward only"""
    torch, mixer = _torch(), getattr(_twins(), name)
    p = _tensors(params, dy is not None)
    x, dy = (a if a is None else torch.from_dlpack(a).mT.contiguous() for a in (x, dy))
    if dy is None:
        return lambda: mixer(p, x, **form)
    x.requires_grad_()
    return lambda: torch.autograd.grad(mixer(p, x, **form), (x, *p.values()), dy)


# HOPE


def hope_sampling(xp, against=None, small=False):
    """(1) at the nodes (4), forward and backward, float32"""
    D, L, n = (8, 32, 4) if small else (256, 2048, 64)
    rng = np.random.default_rng(0)
    h = (rng.standard_normal((D, n)) + 1j * rng.standard_normal((D, n))).astype("complex64")
    log_dt = rng.uniform(np.log(1e-4), 0, D).astype("float32")
    dg = (rng.standard_normal((D, L)) + 1j * rng.standard_normal((D, L))).astype("complex64")
    h, log_dt, dg = (backend.to_device(a, xp) for a in (h, log_dt, dg))

    def ours(h, J):
        half = xp.ascontiguousarray(dg[:, :J])

        def call():
            _, cache = hope.sample_forward(h, log_dt, L, J)
            return hope.sample_backward(half, cache)

        return call

    def theirs():
        inputs, (dy,) = _tensors((h, log_dt), True), _tensors((dg,), False)
        sampling, grad = _twins().hope_sampling, _torch().autograd.grad
        return lambda: grad(sampling(*inputs, L), inputs, dy)

    return {
        "ours, complex h, all L nodes": ours(h, L),
        "ours, what the operator needs: Re h, L/2+1": ours(h.real.copy(), L // 2 + 1),
    }, {"PyTorch, table of powers, autograd": theirs()} if against else {}


def hope_mixer(xp, against=None, small=False):
    """The whole mixer at (B, L, D) = (8, 2048, 128), n = 64, forward and backward, float32"""
    B, L, D = (1, 16, 4) if small else (8, 2048, 128)
    rng = np.random.default_rng(0)
    cfg = hope.Config(d_model=D, d_state=64, convention="lra", dt_max=1.0)
    params = hope.mixer_init(cfg, rng)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    x, dy = backend.to_device(rng.standard_normal((2, B, L, D)).astype("float32"), xp)

    def ours():
        _, cache = hope.mixer_forward(params, x, cfg)
        return hope.mixer_backward(dy, cache)

    theirs = {"PyTorch, table of powers, autograd": "hope_mixer"} if against else {}
    theirs = {title: _their_mixer(name, params, x, dy) for title, name in theirs.items()}
    return {"ours": ours}, theirs


# S4D and S4


def _layer(model, part, xp, small):
    """module, cfg, params of `part`, rng and (B, L, D): N = 64, two channels when small"""
    B, L, D = (1, 16, 2) if small else (8, 2048, 128)
    rng, module = np.random.default_rng(0), network.model_module(model)
    length = {"l_max": L} if model == "s4" else {}
    cfg = module.Config(d_model=D, d_state=64, **length)
    params = getattr(module, f"{part}_init")(cfg, rng)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    return module, cfg, params, rng, (B, L, D)


def _forms(model, against):
    """The forms that PyTorch's kernel has: title -> name"""
    forms = getattr(_twins(), f"{model.upper()}_FORMS") if against else ()
    return {f"PyTorch, {form}, autograd": form for form in forms}


def ssm_kernel(model, xp, against=None, small=False):
    """Kernel generation at (L, D) = (2048, 128), N = 64, forward and backward, float32"""
    module, cfg, params, rng, (_, L, D) = _layer(model, "operator", xp, small)
    params.pop("D")
    dk = backend.to_device(rng.standard_normal((1, D, L)).astype("float32"), xp)

    def ours():
        _, cache = module.kernel_forward(params, L, cfg)
        return module.kernel_backward(dk, cache)

    def theirs(form):
        p, (dy,) = _tensors(params, True), _tensors((dk,), False)
        kernel, grad = getattr(_twins(), f"{model}_kernel"), _torch().autograd.grad
        return lambda: grad(kernel(p, L, form), tuple(p.values()), dy)

    forms = _forms(model, against)
    return {"ours": ours}, {title: theirs(form) for title, form in forms.items()}


def ssm_mixer(model, xp, against=None, small=False, backward=True):
    """The whole mixer at (B, L, D) = (8, 2048, 128), N = 64, float32"""
    module, cfg, params, rng, shape = _layer(model, "mixer", xp, small)
    x, dy = backend.to_device(rng.standard_normal((2, *shape)).astype("float32"), xp)

    def ours():
        y, cache = module.mixer_forward(params, x, cfg)
        return module.mixer_backward(dy, cache) if backward else y

    dy, name = dy if backward else None, f"{model}_mixer"
    forms = _forms(model, against)
    return {"ours": ours}, {
        title: _their_mixer(name, params, x, dy, form=form) for title, form in forms.items()
    }


def ssm_steps(model, xp, against=None, small=False):
    """STEPS time steps of the block at D = 128, N = 64, float32; ours alone"""
    module, cfg, params, rng, (_, _, D) = _layer(model, "block", xp, small)

    def ours(batch):
        x = backend.to_device(rng.standard_normal((STEPS, batch, D)).astype("float32"), xp)
        before = module.state(params, cfg, batch)

        def call():
            state = before
            for x_t in x:
                _, state = module.step(params, x_t, state, cfg)

        return call

    return {f"ours, batch {batch}": ours(batch) for batch in (1, 16)}, {}


def _ssm_benches(model):
    """What S4D and S4 have in common"""
    name = model.upper()
    forward = functools.partial(ssm_mixer, model, backward=False)
    return {
        f"{name}, kernel, forward + backward, D 128, L 2048, N 64": functools.partial(
            ssm_kernel, model
        ),
        f"{name}, mixer, forward + backward, (8, 2048, 128), N 64": functools.partial(
            ssm_mixer, model
        ),
        f"{name}, mixer, forward, (8, 2048, 128), N 64": forward,
        f"{name}, block, {STEPS} decoding steps, D 128, N 64": functools.partial(ssm_steps, model),
    }


# Transformer


def transformer_block(xp, against=None, small=False, bidirectional=False):
    """The block at (B, L, D) = (8, 1024, 128), 4 heads, forward and backward, float32"""
    shape = (1, 16, 8) if small else (8, 1024, 128)
    rng = np.random.default_rng(0)
    cfg = transformer.Config(d_model=shape[2], bidirectional=bidirectional)
    params = transformer.block_init(cfg, rng)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    x, dy = backend.to_device(rng.standard_normal((2, *shape)).astype("float32"), xp)

    def ours():
        _, cache = transformer.block_forward(params, x, cfg)
        return transformer.block_backward(dy, cache)

    def theirs(form):
        p, (own,), (dout,) = _tensors(params, True), _tensors((x,), True), _tensors((dy,), False)
        block, grad = _twins().transformer_block, _torch().autograd.grad
        inputs = (own, *p.values())
        return lambda: grad(block(p, own, cfg.n_heads, cfg.causal, form), inputs, dout)

    forms = _forms("transformer", against)
    return {"ours": ours}, {title: theirs(form) for title, form in forms.items()}


_BLOCK = "block, forward + backward, (8, 1024, 128), 4 heads"
BENCHES = {
    "hope": {
        "HOPE, sampling, forward + backward, D 256, L 2048, n 64": hope_sampling,
        "HOPE, mixer, forward + backward, (8, 2048, 128), n 64": hope_mixer,
    },
    "s4": _ssm_benches("s4"),
    "s4d": _ssm_benches("s4d"),
    "transformer": {
        f"Transformer, causal, {_BLOCK}": transformer_block,
        f"Transformer, bidirectional, {_BLOCK}": functools.partial(
            transformer_block, bidirectional=True
        ),
    },
}
