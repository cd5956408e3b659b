"""`python -m ref bench etsc`: what the conversion of a long convolution costs and loses, and what a
token costs after it.

conversion: error |k - t| / |t| and time against the number of coefficients n and against the width,
as the paper compares them: exact, Hankel, gradient descent (of as many steps at every size, with as
many modes as coefficients up to a limit, so that it is trained equally and its time is comparable);
then how the error of an exact system grows as it is decoded to its end. decode: time and memory of
a token against its position, for a kernel like a Toeplitz network's, eight times as long as it was
trained on.

Each prints its tables, draws FILE.png where matplotlib is installed, and writes FILE.json.
"""

import dataclasses
import json
import time

import numpy as np

from ref import Error, bench, etsc, nn
from ref.backend import parallel_lock
from ref.files import write_atomically

METHODS = {
    "exact": {},
    "hankel, triangle": {"method": "hankel", "hankel": "triangle"},
    "hankel, rectangle": {"method": "hankel", "hankel": "rectangle"},
    "adam": {"method": "adam"},
}
PATIENCE = 20  # seconds that a conversion may take; where it would take longer, it is left out
ADAM = {"steps": 300, "modes": 256}  # at every size; modes: n where it is less
TIMED = 25  # calls of which a time is the median


def run(what, path, quick, malloc="keep"):
    """Print, draw into path (a PNG) and write the JSON beside it; quick: small sizes; malloc as in
    bench.run.   Error: path is no PNG, or its folder is missing"""
    if path.suffix != ".png" or not path.parent.is_dir():
        raise Error(f"{path}: expected the name of a .png file in a folder that exists.")
    environment = bench.environment(np, None, malloc)
    print(environment)
    make, draw = {"conversion": (conversion, draw_conversion), "decode": (decode, draw_decode)}[
        what
    ]
    results = {"what": what, "quick": quick, "environment": environment} | make(quick)
    write_atomically(path.with_suffix(".json"), json.dumps(results, indent=1).encode())
    print(path.with_suffix(".json"))
    try:
        from ref import plots
    except ImportError:
        print("matplotlib is not installed (the extra `plot`): no figure")
        return
    plots._save(draw(plots.plt, results), path)
    print(path)


def kernels(width, n, seed=0):
    """Coefficients like the models': every other channel decaying oscillations with a power-law
    tail, the others white noise with decay.   -> (width, n)"""
    rng, j = np.random.default_rng(seed), np.arange(n)
    rate, turn = np.exp(-1 / rng.uniform(3, 300, (2, width, 1))), rng.uniform(0, 1, (width, 1))
    waves = rate[0] ** j * np.cos(turn * j) + 0.5 * rate[1] ** j + 0.2 / (1 + j) ** 1.2
    noise = rng.standard_normal((width, n)) * rate[1] ** j
    return np.where(np.arange(width)[:, None] % 2 == 0, waves, noise)


# Conversion


def conversion(quick):
    """-> {"by_n", "by_width": rows, "growth": columns}"""
    lengths = [2**i for i in (range(6, 8) if quick else range(6, 14))]
    width, n, rank = (2, 64, 8) if quick else (4, 64, 32)
    print(f"\nagainst n: {width} channels, hankel of {rank} states")
    adam = {"steps": 20, "modes": 16} if quick else ADAM
    by_n = table("n", [(n, width) for n in lengths], rank, adam)
    print(f"\nagainst the width: n = {n}, hankel of 16 states")
    by_width = table("width", [(n, width) for width in lengths], 16, adam)
    print("\nan exact system, decoded to its end: RMS error of outputs, relative to their RMS")
    tables = {"adam": adam, "by_n": by_n, "by_width": by_width}
    return tables | {"growth": growth(256 if quick else 8192)}


def table(name, sizes, rank, adam):
    """Convert, print a line each; `rank` of hankel, steps and modes of adam.   -> rows

    Errors are means over the half of the channels that is smooth, and over the other one.
    """
    print(f"{label_of('adam', adam)}; what would take over {PATIENCE} s is left out")
    print(f"{name:>8}  {'method':18} {'smooth':>9} {'noisy':>9} {'seconds':>9}")
    rows, last = [], {}
    for n, width in sizes:
        t = kernels(width, n)
        for label, settings in METHODS.items():
            if settings.get("method") == "hankel":
                settings = settings | {"rank": rank if n > 2 * rank else n // 4}
            if label == "adam":
                settings = settings | {"steps": adam["steps"], "rank": min(n, adam["modes"])}
            if 2.5 * last.get(label, 0) > PATIENCE:
                print(
                    f"{width if name == 'width' else n:8,}  {label:18} left out: it takes too long"
                )
                continue
            start = time.perf_counter()
            error = etsc.to_ssm(t, **settings).error
            last[label] = time.perf_counter() - start
            row = {"n": n, "width": width, "method": label, "steps": settings.get("steps")}
            row |= {"smooth": float(error[::2].mean()), "noisy": float(error[1::2].mean())}
            rows.append(row | {"seconds": last[label]})
            errors = f"{row['smooth']:9.1e} {row['noisy']:9.1e}"
            print(f"{dict(row)[name]:8,}  {label:18} {errors} {last[label]:9.3f}")
    return rows


def label_of(method, adam):
    """The method's name in a heading or a legend"""
    if method != "adam":
        return method
    return f"adam, always {adam['steps']} steps, n modes or {adam['modes']}"


def growth(n):
    """Error of decoded outputs against position: float64, float32, and with λ in complex64 as well

    -> {"position", and of each its errors}
    """
    t, x = kernels(4, n), np.random.default_rng(1).standard_normal((1, n, 4))
    rounded = x.astype("float32").astype("float64"), t.astype("float32").astype("float64")
    expected, _ = nn.fft_conv_forward(*rounded)
    system = etsc.to_ssm(rounded[1])
    single = etsc.to_ssm(t.astype("float32"))
    all_single = dataclasses.replace(single, lam=single.lam.astype("complex64"))
    systems = {"float64": system, "float32": single, "float32, λ complex64": all_single}
    ends = [2**i for i in range(4, n.bit_length())]
    results = {"position": ends}
    for label, system in systems.items():
        state, steps = etsc.start(system, 1), []
        for i in range(n):
            y, state = etsc.step(system, rounded[0][:, i].astype(system.d.dtype), state)
            steps.append(y)
        off = np.stack(steps, axis=1) - expected
        windows = [slice(end // 2, end) for end in ends]
        rms = [np.sqrt((off[:, w] ** 2).mean() / (expected[:, w] ** 2).mean()) for w in windows]
        results[label] = [float(value) for value in rms]
    labels = list(systems)
    print(f"{'position':>8}  " + " ".join(f"{label:>20}" for label in labels))
    for i, end in enumerate(ends):
        print(f"{end:8,}  " + " ".join(f"{results[label][i]:20.1e}" for label in labels))
    return results


# Decoding


def decode(quick):
    """-> {"training_length", "width", "horizon", "rows"}: float32, batch 1"""
    trained, width = (32, 16) if quick else (512, 384)
    n = 8 * trained
    some = (kernels(width // 8, n) * 0.999 ** np.arange(n)).astype("float32")
    t = np.tile(some, (8, 1))  # to reduce some of the channels is enough
    x = np.random.default_rng(1).standard_normal((1, n, width)).astype("float32")
    rank = 8 if quick else 32
    exact = etsc.to_ssm(t)
    reduced = etsc.to_ssm(some, method="hankel", rank=rank, hankel="rectangle")
    smooth, noisy = reduced.error[::2].mean(), reduced.error[1::2].mean()
    tiled = {"lam": np.tile(reduced.lam, (8, 1)), "b": np.tile(reduced.b, (8, 1))}
    reduced = dataclasses.replace(reduced, **tiled, d=np.tile(reduced.d, 8))
    print(f"\nwidth {width}, batch 1, float32, a kernel of {n:,} coefficients (8 x {trained})")
    print(f"reduced to {rank} states: error {smooth:.1e} where smooth, {noisy:.1e} where noisy")
    print(f"{'position':>8}  {'form':24} {'ms':>9} {'MiB':>9}")
    rows, positions = [], [2**i for i in range(4, n.bit_length())]
    positions[-1] = n - TIMED
    for position in positions:
        calls = {
            "FFT of the whole prefix": prefix(t, x, position),
            "ring buffer": ring_buffer(t, x, position),
            "exact system": recurrence(exact, x, position),
            f"system of {rank} states": recurrence(reduced, x, position),
        }
        for label, (call, held) in calls.items():
            seconds = median(call)
            rows.append({"position": position, "form": label, "seconds": seconds, "bytes": held})
            print(f"{position:8,}  {label:24} {1e3 * seconds:9.3f} {held / 2**20:9.3f}")
    return {"training_length": trained, "width": width, "horizon": n, "rows": rows}


def median(call):
    """Seconds of one of TIMED calls, after one that does not count"""
    call()
    times = []
    for _ in range(TIMED - 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def prefix(t, x, position):
    """A token by convolving all inputs so far.   -> call, bytes held"""
    known, taps = x[:, : position + 1], t[:, : position + 1]
    return lambda: nn.fft_conv_forward(known, taps)[0][:, -1], known.nbytes + t.nbytes


def ring_buffer(t, x, position):
    """A token by the taps and the inputs that there have been, compiled and on all threads: every
    input stands twice in memory, so that the last ones are always in a row

    -> call, bytes held
    """
    n, now = t.shape[1], position
    ring, taps = np.zeros((len(t), 2 * n), t.dtype), np.ascontiguousarray(t[:, ::-1])
    ring[:, :now] = ring[:, n : n + now] = x[0, :now].T
    product = compiled_product()

    def call():
        nonlocal now
        y = np.empty(len(t), t.dtype)
        ring[:, now % n] = ring[:, now % n + n] = x[0, now]
        with parallel_lock:
            product(ring, taps, now % n + n + 1, min(now + 1, n), y)
        now += 1
        return y

    return call, ring.nbytes + taps.nbytes


def compiled_product():
    """Sums over the `m` entries of a row of ring before `end`, times the last m taps"""
    import numba

    if not hasattr(compiled_product, "made"):

        @numba.njit(fastmath={"contract", "reassoc"})
        def row(a, b):
            total = np.float32(0)
            for j in range(len(a)):
                total += a[j] * b[j]
            return total

        @numba.njit(parallel=True)
        def product(ring, taps, end, m, y):
            for c in numba.prange(len(y)):
                y[c] = row(ring[c, end - m : end], taps[c, taps.shape[1] - m :])

        compiled_product.made = product
    return compiled_product.made


def recurrence(system, x, position):
    """A token by `step`.   -> call, bytes held"""
    state = etsc.prefill(system, x[:, :position], etsc.start(system, 1))
    held = sum(a.nbytes for a in (state["u"], system.lam, system.b, system.d))

    def call():
        nonlocal state
        y, state = etsc.step(system, x[:, state["position"]], state)
        return y

    return call, held


# Pictures


def draw_conversion(plt, results):
    """Errors above, times below, against n and against the width; the growth on the right"""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.5))
    for column, (rows, name) in enumerate((("by_n", "n"), ("by_width", "width"))):
        top, bottom = axes[:, column]
        for i, label in enumerate(METHODS):
            own = [row for row in results[rows] if row["method"] == label]
            sizes, colour = [row[name] for row in own], f"C{i}"
            name_of = label_of(label, results["adam"])
            top.plot(sizes, [row["smooth"] for row in own], "o-", color=colour, ms=4, label=name_of)
            top.plot(sizes, [row["noisy"] for row in own], "s--", color=colour, ms=4, alpha=0.6)
            bottom.plot(
                sizes, [row["seconds"] for row in own], "o-", color=colour, ms=4, label=label
            )
        what = "coefficients n" if name == "n" else "width (channels)"
        top.set(title=f"error against {what}", ylabel="relative error |k - t| / |t|")
        bottom.set(title=f"time against {what}", ylabel="time of the conversion (s)")
        for axis in (top, bottom):
            axis.set(xscale="log", yscale="log", xlabel=what)
            axis.set_xscale("log", base=2)
    axes[0, 0].plot([], [], "s--", color="gray", ms=4, label="dashed: of noisy kernels")
    axes[1, 2].legend(*axes[0, 0].get_legend_handles_labels(), loc="upper left")
    position, right = results["growth"]["position"], axes[0, 2]
    for i, (label, errors) in enumerate(results["growth"].items()):
        if label != "position":
            right.plot(position, errors, "o-", color=f"C{i + 3}", ms=4, label=label)
    right.set(title="an exact system, decoded to its end", xlabel="position (token)")
    right.set(ylabel="RMS error / RMS output", yscale="log")
    right.set_xscale("log", base=2)
    right.legend(fontsize="small")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[1, 2].axis("off")
    figure.tight_layout()
    return figure


def draw_decode(plt, results):
    """Time and memory of a token against its position"""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for label in dict.fromkeys(row["form"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["form"] == label]
        positions = [row["position"] for row in own]
        axes[0].plot(positions, [1e3 * row["seconds"] for row in own], "o-", ms=4, label=label)
        axes[1].plot(positions, [row["bytes"] / 2**20 for row in own], "o-", ms=4, label=label)
    axes[0].set(ylabel="time of a token (ms)")
    axes[1].set(ylabel="memory held (MiB)")
    for axis in axes:
        axis.axvline(results["training_length"], color="gray", ls=":", label="training length")
        axis.set(xlabel="position (token)", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set(title=f"decoding, width {results['width']}, batch 1, float32")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    return figure
