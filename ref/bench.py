"""`python -m ref bench`: times and memory as ratios against another implementation, interleaved in
one process.

Every figure is the median of several rounds in which the candidates run in turn. The base of the
ratios is the fastest candidate of the other library; without one, the first of ours. Memory is how
far the peak of a fresh process rises above what it holds before the call.

A model's benchmarks are one entry of BENCHES, title -> make. make(xp, against, small) returns two
dicts, name -> call: ours and theirs; their layers are in tests/torch_twins.py. Lines that stand
below a table, such as the floor of a scan, are made from its times by the entry of REMARKS.

PyTorch maps fresh memory for large results and gives it back, at every step, and touching fresh
pages costs more than many a kernel. Unless --malloc default is given, glibc is asked to keep freed
memory, for all candidates: the faster PyTorch, and the ratio that is harder to reach.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np

from ref import Error, backend, hope, hyena, network, tnn, transformer

ROUNDS = 9
PAUSE = 0.05  # seconds before each call: idle threads of the candidate before it spin for a while
PEERS = Path(__file__).parents[1] / "tests" / "torch_twins.py"
STEPS = 64  # of a decoding call
MALLOC = {"keep": "keeps freed memory", "default": "as it is by default"}


def environment(xp, against, malloc="keep"):
    """One line that a ratio must name: device, or threads, BLAS core type, allocator; versions"""
    versions = f"numpy {np.__version__}"
    if against:
        versions += f", {against} {_torch().__version__}"
    if xp is not np:
        return f"{backend.device_name(xp)}, {xp.__name__} {xp.__version__}, {versions}"
    core = backend.blas_core()
    malloc = f"malloc {MALLOC[malloc]} (for all candidates)"
    return f"{backend.threads()} threads, BLAS core type {core}, {malloc}, {versions}"


def run(models, against, rounds=ROUNDS, device="cpu", malloc="keep"):
    """Print one table per benchmark of the models; against: torch or None; device as in train.py;
    malloc: what the process has asked glibc for"""
    xp = backend.select_device(device)
    if against:
        _twins()
    print(environment(xp, against, malloc))
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
            for remark in REMARKS[title](times) if title in REMARKS and xp is np else ():
                print(f"    {remark}")


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
    with contextlib.suppress(OSError, AttributeError):  # else what making the inputs freed would
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # be counted as held before the call
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


def _part(model, part, cfg, B, L, xp):
    """A part of a model on random input.   -> params, x, dy, and the call: forward and backward"""
    rng, module = np.random.default_rng(0), network.model_module(model)
    params = getattr(module, f"{part}_init")(cfg, rng)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    widths = network.part_width(model, part, cfg), cfg.d_model
    x, dy = (rng.standard_normal((B, L, width)).astype("float32") for width in widths)
    x, dy = backend.to_device(x, xp), backend.to_device(dy, xp)
    forward, backward = (getattr(module, f"{part}_{way}") for way in ("forward", "backward"))

    def ours():
        _, cache = forward(params, x, cfg)
        return backward(dy, cache)

    return params, x, dy, ours


def _their_part(name, params, buffers, x, dy):
    """The twin of that name in PyTorch, which has the channels before the time: the same call"""
    torch, layer = _torch(), getattr(_twins(), name)
    constants = {name: params[name] for name in buffers}
    trained = {name: p for name, p in params.items() if name not in constants}
    p = _tensors(trained, True) | _tensors(constants, False)
    own, dout = (torch.from_dlpack(a).mT.contiguous() for a in (x, dy))
    inputs = (own.requires_grad_(), *(p[name] for name in trained))
    return lambda: torch.autograd.grad(layer(p, own), inputs, dout)


# Hyena


def hyena_layer(part, xp, against=None, small=False):
    """The operator or the mixer at (B, L, D) = (8, 2048, 128), order 2, forward and backward,
    float32"""
    B, L, D = (1, 16, 4) if small else (8, 2048, 128)
    cfg = hyena.Config(d_model=D, l_max=L)
    params, x, dy, ours = _part("hyena", part, cfg, B, L, xp)
    calls = {}
    if against:
        theirs = _their_part(f"hyena_{part}", params, hyena.buffers(cfg), x, dy)
        calls["PyTorch, FFTs of 2L, autograd"] = theirs
    return {"ours": ours}, calls


# TNN


def tnn_layer(part, xp, against=None, small=False):
    """The operator, or the mixer with one of three times the width, at (B, L, D) = (8, 2048, 128),
    causal with a fixed decay, forward and backward, float32"""
    B, L, D = (1, 16, 4) if small else (8, 2048, 128)
    ratio = 1.0 if part == "operator" else 3.0
    cfg = tnn.Config(d_model=D, expand_ratio=ratio, use_decay=True, gamma=0.99)
    params, x, dy, ours = _part("tnn", part, cfg, B, L, xp)
    calls = {}
    if against:
        theirs = _their_part(f"tnn_{part}", params, tnn.buffers(cfg), x, dy)
        calls["PyTorch, FFTs of 2L, autograd"] = theirs
    if against and importlib.util.find_spec("tnn_pytorch"):
        calls["tnn-pytorch"] = _their_tnn(part, params, x, dy, cfg)
    return {"ours": ours}, calls


def _their_tnn(part, params, x, dy, cfg):
    """The same by the authors' modules, on one head"""
    torch, package = _torch(), importlib.import_module("tnn_pytorch")
    own = dict(causal=True, use_decay=True)
    if part == "operator":
        module = package.Tno(h=1, dim=cfg.width, rpe_dim=len(params["W_p"]), **own)
    else:
        own |= dict(embed_dim=cfg.d_model, num_heads=1, rpe_embedding=len(params["W_p"]))
        module = package.Gtu(**own)
    module.load_state_dict(_tensors(tnn.to_published(params, cfg, part), False))
    module.to(torch.from_dlpack(x).device)
    (x,), (dy,) = _tensors((x,), True), _tensors((dy,), False)
    heads = (lambda a: a[:, None]) if part == "operator" else (lambda a: a)
    trained = [p for p in module.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(module(heads(x)), (x, *trained), heads(dy))


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


# Mamba and Longhorn

SCAN = {"B": 4, "L": 2048, "E": 256, "N": 16}
ODD = [{"L": 2039}, {"L": 4096}, {"E": 251}, {"E": 257}, {"N": 13}, {"N": 17}]
# Operations on vectors of 16 numbers for 16 of the B L E N states, forward and backward together:
# Mamba's two exponentials are 10 each, the forward once and again in the backward
OPERATIONS = {"mamba": 36, "longhorn": 20}
STREAMS = 8  # arrays (B, L, E) that a scan must read or write: 3 forward, 5 backward
CHECKPOINT = dict(d_model=768, n_layers=24, vocabulary=50280)  # the shape of mamba-130m
TOKENS = 8  # of a decoding call


def scan_problem(model, xp, B, L, E, N):
    """The arguments of a recurrence, by name, and dy (B, L, E), float32"""
    rng = np.random.default_rng(0)
    x, dt, dy = rng.standard_normal((3, B, L, E))
    b, c = rng.standard_normal((2, B, L, N))
    if model == "mamba":
        given = {
            "x": x,
            "delta": np.exp(0.5 * dt - 3),
            "A": -np.tile(np.arange(1.0, N + 1), (E, 1)),
        }
        given |= {"B": b, "C": c}
    else:
        given = {"x": x, "beta": 1 / (1 + np.exp(-dt)), "k": b, "q": c}
    given["D"] = np.ones(E)
    given = {name: backend.to_device(a.astype("float32"), xp) for name, a in given.items()}
    return given, backend.to_device(dy.astype("float32"), xp)


def _our_scan(model, given, dy):
    module = network.model_module(model)

    def call():
        _, _, cache = module.recurrence_forward(**given)
        return module.recurrence_backward(dy, cache)

    return call


def _readable(call):
    """The call in the readable form"""

    def run():
        before = os.environ.get("REF_PLAIN", "0")
        os.environ["REF_PLAIN"] = "1"
        try:
            return call()
        finally:
            os.environ["REF_PLAIN"] = before

    return run


def scan(model, xp, against=None, small=False):
    """The recurrence with its skip at (B, L, E, N) = (4, 2048, 256, 16), forward and backward"""
    given, dy = scan_problem(model, xp, *((1, 8, 4, 3) if small else SCAN.values()))
    call = _our_scan(model, given, dy)

    def theirs(form):
        inputs, (dout,) = _tensors(given, True), _tensors((dy,), False)
        run, grad = getattr(_twins(), f"{model}_scan"), _torch().autograd.grad
        own = tuple(inputs.values())
        return lambda: grad(run(*own, form), own, dout)

    forms = _forms(model, against)
    ours = {"ours": call, "ours, readable form": _readable(call)}
    return ours, {title: theirs(form) for title, form in forms.items()}


def scan_sizes(model, xp, against=None, small=False):
    """The same at lengths, widths and numbers of states that are no powers of two; ours alone"""
    calls = {}
    for other in ({}, *ODD):
        sizes = SCAN | other
        sizes = {name: n % 16 + 1 for name, n in sizes.items()} if small else sizes
        calls[_sizes(SCAN | other)] = _our_scan(model, *scan_problem(model, xp, **sizes))
    return calls, {}


def _sizes(sizes):
    return "ours, " + ", ".join(f"{name} {n}" for name, n in sizes.items())


def scan_layer(model, xp, against=None, small=False, part="mixer"):
    """The mixer or the block at (B, L, D) = (8, 2048, 128), forward and backward, float32"""
    B, L, D = (1, 16, 8) if small else (8, 2048, 128)
    cfg = network.model_module(model).Config(d_model=D)
    params, x, dy, ours = _part(model, part, cfg, B, L, xp)

    def theirs(form):
        p, (own,), (dout,) = _tensors(params, True), _tensors((x,), True), _tensors((dy,), False)
        layer, grad = getattr(_twins(), f"{model}_{part}"), _torch().autograd.grad
        inputs = (own, *p.values())
        return lambda: grad(layer(p, own, form), inputs, dout)

    forms = _forms(model, against)
    return {"ours": ours}, {title: theirs(form) for title, form in forms.items()}


def decoding(xp, against=None, small=False):
    """TOKENS greedy steps of a language model of 130 million parameters, batch 1, float32"""
    sizes = dict(d_model=16, n_layers=2, vocabulary=24) if small else CHECKPOINT
    D, layers, V = sizes.values()
    layer = network.model_module("mamba").Config(d_model=D, depth=layers)
    own = dict(d_input=V, d_output=V, decoder="lm", tied=True, final_norm=True)
    cfg = network.Config("mamba", layer, layers, **own)
    params = network.init(cfg, np.random.default_rng(0))
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    before = network.state(params, cfg, 1)

    def ours():
        state, token = before, xp.zeros(1, dtype="int64")
        for _ in range(TOKENS):
            logits, state = network.step(params, token, state, cfg)
            token = logits.argmax(axis=-1)

    known = against and importlib.util.find_spec("transformers")
    return {"ours": ours}, {"transformers, with its cache": _their_steps(sizes)} if known else {}


def _their_steps(sizes):
    """The same by MambaForCausalLM"""
    torch, transformers = _torch(), importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    names = dict(
        zip(("hidden_size", "num_hidden_layers", "vocab_size"), sizes.values(), strict=True)
    )
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**names)).eval()

    def call():
        cache, token = None, torch.zeros(1, 1, dtype=torch.int64)
        with torch.inference_mode():
            for _ in range(TOKENS):
                out = model(token, cache_params=cache, use_cache=True)
                cache, token = out.cache_params, out.logits[:, -1].argmax(-1)[:, None]

    return call


# Remarks


def floor(model, times):
    """What the machine's arithmetic and memory allow a scan, measured on the spot"""
    B, L, E, N = SCAN.values()
    by_arithmetic = OPERATIONS[model] * B * L * E * N / 16 / multiply_adds()
    by_bandwidth = STREAMS * 4 * B * L * E / triad()
    ratio = min(times["ours"]) / max(by_arithmetic, by_bandwidth)  # of the best against the best
    bounds = f"{1e3 * by_arithmetic:.2f} ms by arithmetic, {1e3 * by_bandwidth:.2f} ms by bandwidth"
    yield f"floor: {bounds}; ours at its best is x {ratio:.2f} of it"


def growth(times):
    """Time per element, relative to round sizes"""
    base = np.median(times[_sizes(SCAN)]) / np.prod(list(SCAN.values()))
    for other in ODD:
        sizes = SCAN | other
        each = np.median(times[_sizes(sizes)]) / np.prod(list(sizes.values())) / base
        (name, n), *_ = other.items()
        yield f"{name} {n}: time per element x {each:.3f}"


def tokens_per_second(times):
    """Of the decoding"""
    for name, t in times.items():
        yield f"{name}: {TOKENS / np.median(t):.1f} tokens per second"


@functools.cache
def multiply_adds():
    """Multiply-adds of vectors of 16 float32 that all threads do in a second: the best of twenty

    Twelve in flight hide an operation's latency with AVX-512; six do, and fit the registers, of
    AVX2, where a vector is two.
    """
    import numba

    from ref.kernels.simd import fma, load, splat, store

    @numba.njit
    def six(x, m, n, rounds):
        x0, x1, x2, x3, x4, x5 = x, x * 2, x * 3, x * 4, x * 5, x * 6
        for _ in range(rounds):
            x0, x1, x2 = fma(x0, m, n), fma(x1, m, n), fma(x2, m, n)
            x3, x4, x5 = fma(x3, m, n), fma(x4, m, n), fma(x5, m, n)
        return x0 + x1 + x2 + x3 + x4 + x5

    @numba.njit
    def twelve(x, m, n, rounds):
        x0, x1, x2, x3, x4, x5 = x, x * 2, x * 3, x * 4, x * 5, x * 6
        y0, y1, y2, y3, y4, y5 = -x0, -x1, -x2, -x3, -x4, -x5
        for _ in range(rounds):
            x0, x1, x2 = fma(x0, m, n), fma(x1, m, n), fma(x2, m, n)
            x3, x4, x5 = fma(x3, m, n), fma(x4, m, n), fma(x5, m, n)
            y0, y1, y2 = fma(y0, m, n), fma(y1, m, n), fma(y2, m, n)
            y3, y4, y5 = fma(y3, m, n), fma(y4, m, n), fma(y5, m, n)
        return x0 + x1 + x2 + x3 + x4 + x5 + y0 + y1 + y2 + y3 + y4 + y5

    @numba.njit(parallel=True)
    def work(a, out, rounds, at_once):
        for i in numba.prange(out.size // 16):
            m, n, x = load(a, 0), splat(np.float32(0.25)), splat(np.float32(1 + i))
            run = six(x, m, n, rounds) if at_once == 6 else twelve(x, m, n, rounds)
            store(out, 16 * i, run)

    tasks, rounds = backend.threads(), 4_000_000  # long enough for all threads to be awake
    a, out = np.full(16, 0.5, "float32"), np.empty(16 * tasks, "float32")
    rates = (n * rounds * tasks / _best(lambda n=n: work(a, out, rounds, n)) for n in (6, 12))
    return max(rates)


@functools.cache
def triad():
    """Bytes a second that all threads move in a = b + 3 c on large arrays: the best of twenty"""
    import numba

    @numba.njit(parallel=True)
    def work(a, b, c):
        for i in numba.prange(a.size):
            a[i] = b[i] + np.float32(3) * c[i]

    arrays = [np.ones(1 << 24, "float32") for _ in range(3)]
    return sum(a.nbytes for a in arrays) / _best(lambda: work(*arrays))


def _best(call):
    times = []
    for _ in range(21):  # the first one compiles
        with backend.parallel_lock:
            start = time.perf_counter()
            call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _scan_benches(model):
    """What Mamba and Longhorn have in common"""
    name, at = model.capitalize(), "forward + backward, (8, 2048, 128), N 16"
    makes = {
        f"{name}, scan, forward + backward, {_sizes(SCAN)[6:]}": scan,
        f"{name}, scan, forward + backward, other sizes": scan_sizes,
        f"{name}, mixer, {at}": scan_layer,
        f"{name}, block, {at}": functools.partial(scan_layer, part="block"),
    }
    return {title: functools.partial(make, model) for title, make in makes.items()}


_DECODING = f"Mamba, {TOKENS} greedy steps, D 768, 24 layers, vocabulary 50,280, batch 1"
_BLOCK = "block, forward + backward, (8, 1024, 128), 4 heads"
BENCHES = {
    "hope": {
        "HOPE, sampling, forward + backward, D 256, L 2048, n 64": hope_sampling,
        "HOPE, mixer, forward + backward, (8, 2048, 128), n 64": hope_mixer,
    },
    "s4": _ssm_benches("s4"),
    "s4d": _ssm_benches("s4d"),
    "hyena": {
        f"Hyena, {part}, forward + backward, (8, 2048, 128), order 2": functools.partial(
            hyena_layer, part
        )
        for part in ("operator", "mixer")
    },
    "longhorn": _scan_benches("longhorn"),
    "mamba": _scan_benches("mamba") | {_DECODING: decoding},
    "tnn": {
        f"TNN, {part}, forward + backward, (8, 2048, 128)": functools.partial(tnn_layer, part)
        for part in ("operator", "mixer")
    },
    "transformer": {
        f"Transformer, causal, {_BLOCK}": transformer_block,
        f"Transformer, bidirectional, {_BLOCK}": functools.partial(
            transformer_block, bidirectional=True
        ),
    },
}

REMARKS = {_DECODING: tokens_per_second}
for _model in ("mamba", "longhorn"):
    _scan, _others, *_ = BENCHES[_model]
    REMARKS |= {_scan: functools.partial(floor, _model), _others: growth}
