"""`python -m ref bench`: times and memory as ratios against another implementation, interleaved in
one process.

Every figure is the median of several rounds in which the candidates run in turn. Memory is how far
the peak of a fresh process rises above what it holds before the call.
"""

import importlib
import multiprocessing
import os
import time

import numpy as np

from ref import backend, hope

ROUNDS = 9


def environment(xp, against):
    """One line that a ratio must name: device, or threads, BLAS core type, allocator; versions"""
    versions = f"numpy {np.__version__}"
    if against:
        versions += f", {against} {_peer(against).__version__}"
    if xp is not np:
        return f"{backend.device_name(xp)}, {xp.__name__} {xp.__version__}, {versions}"
    core = backend.blas_core()
    malloc = "malloc keeps freed memory (for all candidates)"
    return f"{backend.threads()} threads, BLAS core type {core}, {malloc}, {versions}"


def _peer(name):
    """The library that is compared with; nothing else in the project knows it"""
    return importlib.import_module(name)


def run(models, against, rounds=ROUNDS, device="cpu"):
    """Print one table per benchmark of the models; against: torch or None; device as in train.py"""
    xp = backend.select_device(device)
    print(environment(xp, against))
    for model in models:
        for title, make in BENCHES[model].items():
            print(f"\n{title}")
            times = interleaved(make(xp, against), rounds, xp)
            on_host = xp is np and os.path.exists("/proc/self/clear_refs")  # else no peak is known
            peaks = {name: peak(make, name, against) if on_host else None for name in times}
            base = next(iter(times))
            for name, seconds in times.items():
                t = 1e3 * np.array(seconds)
                line = f"    {name:42} {np.median(t):9.2f} ms [{t.min():.2f} to {t.max():.2f}]"
                line += f"  {peaks[name] / 2**20:8.1f} MiB" if on_host else ""
                if name != base:
                    ratio = np.median(t / (1e3 * np.array(times[base])))
                    line += f"   time x {ratio:.3f}"
                    line += f", memory x {peaks[name] / peaks[base]:.3f}" if on_host else ""
                print(line)


def interleaved(calls, rounds, xp):
    """name -> seconds of each round, the calls in turn, after two rounds that do not count"""
    times = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            backend.synchronize(xp)
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
    make(np, against, small=True)[name]()
    calls = make(np, against)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    before = _status("VmRSS")
    calls[name]()
    return _status("VmHWM") - before


def _status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


# HOPE


def hope_sampling(xp, against=None, small=False):
    """(1) at the nodes (4), forward and backward, float32"""
    D, L, n = (8, 32, 4) if small else (256, 2048, 64)
    rng = np.random.default_rng(0)
    h = (rng.standard_normal((D, n)) + 1j * rng.standard_normal((D, n))).astype("complex64")
    log_dt = rng.uniform(np.log(1e-4), 0, D).astype("float32")
    dg = (rng.standard_normal((D, L)) + 1j * rng.standard_normal((D, L))).astype("complex64")
    h, log_dt, dg = (backend.to_device(a, xp) for a in (h, log_dt, dg))
    calls = {}
    if against == "torch":
        calls["PyTorch, table of powers, autograd"] = _torch_sampling(h, log_dt, dg)

    def ours(h, J):
        half = xp.ascontiguousarray(dg[:, :J])

        def call():
            _, cache = hope.sample_forward(h, log_dt, L, J)
            return hope.sample_backward(half, cache)

        return call

    calls["ours, complex h, all L nodes"] = ours(h, L)
    calls["ours, what the operator needs: Re h, L/2+1"] = ours(h.real.copy(), L // 2 + 1)
    return calls


def _torch_sampling(h, log_dt, dg):
    """As the published code does it: (2), its angle, the whole (D, L, n) table, one sum"""
    torch = _peer("torch")
    h, log_dt, dg = (torch.from_dlpack(a).clone() for a in (h, log_dt, dg))
    h.requires_grad_()
    log_dt.requires_grad_()
    L, exponents = dg.shape[1], -torch.arange(1, h.shape[1] + 1, device=h.device)

    def call():
        dt = log_dt.exp()[:, None]
        w = torch.exp(2j * torch.pi * torch.arange(L, device=dt.device) / L)
        mapped = ((1 + dt) * w + dt - 1) / ((dt - 1) * w + dt + 1)
        powers = torch.exp(1j * mapped.angle()[:, :, None] * exponents)
        g = torch.einsum("dn,dln->dl", h, powers)
        return torch.autograd.grad(g, (h, log_dt), dg)

    return call


def hope_mixer(xp, against=None, small=False):
    """The whole mixer at (B, L, D) = (8, 2048, 128), n = 64, forward and backward, float32"""
    B, L, D = (1, 16, 4) if small else (8, 2048, 128)
    rng = np.random.default_rng(0)
    cfg = hope.Config(d_model=D, d_state=64, convention="lra", dt_max=1.0)
    params = hope.mixer_init(cfg, rng)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    x, dy = backend.to_device(rng.standard_normal((2, B, L, D)).astype("float32"), xp)
    calls = {}
    if against == "torch":
        calls["PyTorch, table of powers, autograd"] = _torch_mixer(params, x, dy)

    def ours():
        _, cache = hope.mixer_forward(params, x, cfg)
        return hope.mixer_backward(dy, cache)

    calls["ours"] = ours
    return calls


def _torch_mixer(params, x, dy):
    """The published layer: complex FFTs of (B, D, L), every node, Conv1d of width 1"""
    torch = _peer("torch")
    p = {name: torch.from_dlpack(a).clone().requires_grad_() for name, a in params.items()}
    x, dy = (torch.from_dlpack(a).mT.clone() for a in (x, dy))
    x.requires_grad_()
    L, exponents = x.shape[2], -torch.arange(1, p["H"].shape[1] + 1, device=x.device)

    def call():
        dt = p["log_dt"].exp()[:, None]
        w = torch.exp(2j * torch.pi * torch.arange(L, device=dt.device) / L)
        mapped = ((1 + dt) * w + dt - 1) / ((dt - 1) * w + dt + 1)
        powers = torch.exp(1j * mapped.angle()[:, :, None] * exponents)
        g = torch.einsum("dn,dln->dl", torch.view_as_complex(p["H"]), powers)
        y = torch.fft.ifft(torch.fft.fft(x) * g).real + x * p["D"][:, None]
        y = torch.nn.functional.gelu(y)
        y = torch.nn.functional.conv1d(y, p["W"][:, :, None], p["b"])
        y = torch.nn.functional.glu(y, dim=1)
        return torch.autograd.grad(y, (x, *p.values()), dy)

    return call


BENCHES = {
    "hope": {
        "HOPE, sampling, forward + backward, D 256, L 2048, n 64": hope_sampling,
        "HOPE, mixer, forward + backward, (8, 2048, 128), n 64": hope_mixer,
    }
}
