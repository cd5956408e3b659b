"""Pictures of runs and models: curves, kernels, Hankel singular values, matrices."""

import contextlib
import dataclasses
import json
import textwrap

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm

from ref import Error, network, presets
from ref.files import read_json, read_tensors, write_atomically

CHANNELS = 4  # of a picture
CUT = (
    "n taps: of the Hankel matrix of a filter's first n taps and 0 beyond. Where the filter has "
    "not died away by then, this cut makes the plateau, not the filter."
)


def _save(figure, path):
    """PNG, atomically"""
    import io

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, content.getvalue())


def draw(what, run, models, settings, length, seed, path):
    """`python -m ref plot`: the curves of a run, or a picture of every layer of a run, or of models
    as initialised, side by side

    Error: no such run; a picture that this configuration does not have.
    """
    if what == "curves":
        if run is None:
            raise Error("--what curves needs the folder of a run.")
        curves(run, path)
        return
    layers = trained_layers(run) if run else initial_layers(models, settings, length, seed)
    pictures = {}
    for title, (module, params, cfg) in layers.items():
        L = min(length, getattr(cfg, "l_max", 0) or length)
        if what == "hankel":
            values = module.hankel_values(params, cfg)
            is_cut = hasattr(module, "HANKEL_SIZE")
            pictures[title + f", {values.shape[1] + 1} taps" * is_cut] = values
        elif what == "kernel":
            both = getattr(cfg, "bidirectional", False)
            if both and hasattr(module, "two_sided_response"):
                pictures[title] = module.two_sided_response(params, cfg, L), 1 - L
                continue
            if both and getattr(cfg, "conv", "") != "circular":
                title += ", forward direction"  # a circle has both
            pictures[title] = module.impulse_response(params, cfg, L), 0
        else:
            width = network.part_width(module.__name__.rpartition(".")[2], "operator", cfg)
            x = np.random.default_rng(seed).standard_normal((1, L, width))
            is_scan = hasattr(module, "scan_forward")
            some = {"channels": CHANNELS} if is_scan else {}  # a scan has so many
            if is_scan or module.__name__ in ("ref.hyena", "ref.transformer"):
                title += ", of white noise"  # such a map depends on its input
            pictures[title] = module.matrix(params, cfg, x, L, **some)[0]
    {"kernel": kernel, "hankel": hankel, "matrix": matrix}[what](pictures, path)


def initial_layers(models, settings, length, seed):
    """-> {title: (module, params, cfg)} of the models' layers at initialisation; a setting applies
    to the models that have it, and S4's C~ is made for the length"""
    layers = {}
    for model in models:
        module = network.model_module(model)
        own = {field.name for field in dataclasses.fields(module.Config)}
        cfg = module.Config(**{name: v for name, v in settings.items() if name in own})
        if getattr(cfg, "l_max", None) == 0:
            cfg = dataclasses.replace(cfg, l_max=length)
        params = module.block_init(cfg, np.random.default_rng(seed), "float64")
        usual = module.Config()
        own = [f"{n} {v}" for n, v in settings.items() if n in own and v != getattr(usual, n)]
        layers[", ".join([f"{model} at initialisation", *own])] = module, params, cfg
    return layers


def trained_layers(run):
    """-> {title: (module, params, cfg)} of a run's blocks"""
    settings = presets.read_settings(run / "config.json")
    module = network.model_module(settings["model"])
    tensors, _ = read_tensors(run / "checkpoint.safetensors")
    params = {n[6:]: t.astype("float64") for n, t in tensors.items() if n.startswith("param.")}
    cfg, layers = module.Config(**settings["layer"]), range(settings["recipe"]["n_layers"])
    expected = module.block_init(cfg, np.random.default_rng(0), "float64")
    for name, p in expected.items():
        found = params.get(f"blocks.{name}", np.zeros(0)).shape
        if found != (len(layers), *p.shape):
            raise Error(
                f"{run}: the checkpoint and config.json are not of one run: {name} {found}."
            )
    name = settings["model"]
    return {f"{name}, layer {i}": (module, network.layer_params(params, i), cfg) for i in layers}


def curves(run, path):
    """Loss and accuracy against steps: training averaged, validation as points, baselines dashed"""
    if not (run / "metrics.jsonl").is_file():
        raise Error(f"{run} is not the folder of a run: it has no metrics.jsonl.")
    lines = list(_whole_lines((run / "metrics.jsonl").read_text()))
    train = [entry for entry in lines if "loss" in entry]
    valid = [entry for entry in lines if "valid_loss" in entry]
    result = read_json(run / "result.json") if (run / "result.json").exists() else {"baselines": {}}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for axis, name in ((left, "loss"), (right, "accuracy")):
        steps = np.array([entry["step"] for entry in train])
        values = np.array([entry.get(name, np.nan) for entry in train])
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, "valid") if len(values) else values
        axis.plot(steps, values, color="tab:blue", alpha=0.25, lw=0.8)
        axis.plot(steps[len(steps) - len(smooth) :], smooth, color="tab:blue", label="training")
        points = [entry.get(f"valid_{name}", np.nan) for entry in valid]
        axis.plot(
            [entry["step"] for entry in valid], points, "o-", color="tab:orange", label="validation"
        )
        axis.set(xlabel="step", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
    for axis, name in ((left, "loss_baselines"), (right, "baselines")):
        baselines = result.get(name, {}).items()
        for (what, value), style in zip(baselines, ("--", ":", "-.", "--"), strict=False):
            axis.axhline(value, color="gray", ls=style, label=f"{what} {value:.3f}")
    if "test_accuracy" in result:
        right.axhline(
            result["test_accuracy"], color="tab:green", label=f"test {result['test_accuracy']:.3f}"
        )
    left.legend()
    right.legend()
    _save(figure, path)


def _whole_lines(text):
    """The objects of metrics.jsonl; a killed run may have left half a line"""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def kernel(layers, path):
    """Impulse responses: a few channels, and the RMS over all.   layers: title -> k (D, n), the lag
    of k's first column"""
    figure, rows = plt.subplots(len(layers), 2, figsize=(11, 2.6 * len(layers)), squeeze=False)
    for (left, right), (title, (k, first)) in zip(rows, layers.items(), strict=True):
        lags = np.arange(first, first + k.shape[1])
        for d in range(min(4, len(k))):
            left.plot(lags, k[d], lw=0.8, label=f"channel {d}")
        right.semilogy(lags, np.sqrt((k * k).mean(axis=0)) + 1e-30, lw=0.8)
        lag = "lag" if first == 0 else "lag, below 0 that of later inputs"
        left.set(xlabel=lag, ylabel="impulse response")
        right.set(xlabel=lag, ylabel="RMS over channels")
        for axis in (left, right):
            axis.set_title(textwrap.fill(title, 60), fontsize="medium")
        left.legend(fontsize="small")
        right.grid(alpha=0.3)
    bottom, top = (f(row[1].get_ylim()[i] for row in rows) for i, f in enumerate((min, max)))
    for _, right in rows:  # side by side means on one scale
        right.set_ylim(max(bottom, 1e-8 * top), top)
    figure.tight_layout()
    _save(figure, path)


def hankel(layers, path):
    """Hankel singular values, median and range.   layers: title -> values (D, n), descending; a
    title that ends in a number of taps: those of a matrix that is cut there"""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for title, values in layers.items():
        relative = values / values[:, :1]
        index = np.arange(1, values.shape[1] + 1)
        (line,) = axis.semilogy(index, np.median(relative, axis=0) + 1e-30, label=title)
        axis.fill_between(
            index,
            relative.min(axis=0) + 1e-30,
            relative.max(axis=0),
            color=line.get_color(),
            alpha=0.15,
        )
    axis.set(xlabel="index", ylabel="Hankel singular value / largest", ylim=(1e-12, 2))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    if any(title.endswith(" taps") for title in layers):
        axis.text(
            0, -0.17, textwrap.fill(CUT, 85), transform=axis.transAxes, va="top", fontsize="small"
        )
    _save(figure, path)


def matrix(layers, path):
    """Sequence maps, blue positive, red negative, logarithmic.   layers: title -> M (D, L, L)"""
    channels = min(CHANNELS, *(len(M) for M in layers.values()))
    figure, rows = plt.subplots(
        len(layers), channels, figsize=(3 * channels, 3 * len(layers)), squeeze=False
    )
    for row, (title, M) in zip(rows, layers.items(), strict=True):
        for d, axis in enumerate(row):
            limit = np.abs(M[d]).max() or 1
            colours = SymLogNorm(1e-3 * limit, vmin=-limit, vmax=limit)
            axis.imshow(M[d], cmap="RdBu", norm=colours, interpolation="nearest")
            axis.set(xlabel="s", ylabel="t")
            axis.set_title(textwrap.fill(f"{title}, channel {d}", 34), fontsize="small")
    figure.tight_layout()
    _save(figure, path)
