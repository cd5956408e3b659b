"""Pictures of runs and models: curves, kernels, Hankel singular values, matrices."""

import contextlib
import dataclasses
import functools
import json
import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ref import Error, network, presets
from ref.files import read_json, read_tensors, write_atomically

CHANNELS = 4  # of a picture
DASHES = (0, (4, 2))
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
    """Loss and accuracy against steps: training averaged, validation as points, baselines dashed;
    below them what a teacher has done, where there is one

    Error: no such run.
    """
    train, valid, result = _read_run(run)
    taught = any("weighted_loss" in entry for entry in train)
    rows = 1 + taught
    figure, panels = plt.subplots(rows, 2, figsize=(11, 4 * rows), squeeze=False)
    left, right = panels[0]
    for axis, name in ((left, "loss"), (right, "accuracy")):
        named = "training, cross-entropy" if taught and name == "loss" else "training"
        _noisy(axis, *_values(train, name), "tab:blue", named)
        axis.plot(*_values(valid, f"valid_{name}"), "o-", color="tab:orange", label="validation")
        axis.set(xlabel="step", ylabel=name + (" (nats)" if name == "loss" else ""))
        axis.grid(alpha=0.3)
    if taught:
        weighted = _smooth(*_values(train, "weighted_loss"))
        named = "weighted loss" if _values(train, "weight_mean")[0].size else "learned loss"
        left.plot(
            *weighted, color="tab:blue", alpha=0.45, lw=1, ls="--", label=f"training, {named}"
        )
        _weights(panels[1, 0], train)
        _learned(panels[1, 1], train)
    for axis, name in ((left, "loss_baselines"), (right, "baselines")):
        baselines = result.get(name, {}).items()
        for (what, value), style in zip(baselines, ("--", ":", "-.", "--"), strict=False):
            axis.axhline(value, color="gray", ls=style, label=f"{what} {value:.3f}")
    if "test_accuracy" in result:
        right.axhline(
            result["test_accuracy"], color="tab:green", label=f"test {result['test_accuracy']:.3f}"
        )
    if "selected_step" in result:
        at = result["selected_step"]
        for axis in panels.flat:
            first = axis is left
            axis.axvline(at, color="k", lw=0.7, label=f"best step, {at:,}" if first else None)
    left.legend()
    right.legend()
    if taught:
        figure.tight_layout(w_pad=2)
    _save(figure, path)


def _weights(axis, train):
    """Mean and deviation of the weights, and the penalty's strength on an axis of its own; of a
    loss without weights the hypergradient's norm"""
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    steps, mean = _smooth(*_values(train, "weight_mean"))
    if not steps.size:
        _noisy(axis, *_values(train, "hypergradient_norm"), "tab:purple", "")
        axis.set(ylabel="norm of the hypergradient", yscale="log")
        return
    half = _smooth(*_values(train, "weight_std"))[1]
    axis.plot(steps, mean, color="tab:purple", label="weight of the penalty")
    if half.shape == mean.shape and half.any():
        band = {"color": "tab:purple", "alpha": 0.18, "lw": 0, "label": "± one deviation"}
        axis.fill_between(steps, mean - half, mean + half, **band)
    _widen(axis, 0.1)
    strength = axis.twinx()
    at, penalty = _smooth(*_values(train, "effective_penalty"))
    strength.plot(at, penalty, color="tab:red", lw=1, ls=DASHES, label="effective penalty")
    _owned(axis, "weight", "tab:purple")
    _owned(strength, "effective penalty", "tab:red")
    if (penalty > 0).any():
        _logarithmic(strength, penalty[penalty > 0])
    _legend_of(axis, strength)


def _learned(axis, train):
    """The losses of teacher and loss network, each on an axis of its own where they are far apart;
    the regulariser where nothing is learned"""
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    in_rounds = any("hypergradient_norm" in entry for entry in train)
    kind = "held-out loss (nats)" if in_rounds else "loss"
    names = {"dln_loss": "loss network", "teacher_loss": "teacher"}
    found = {name: _values(train, name) for name in names}
    found = {name: both for name, both in found.items() if both[0].size}
    if not found:
        _noisy(axis, *_values(train, "regulariser"), "tab:brown", "")
        axis.set_ylabel("regulariser")
        return
    smooth = [_smooth(*both)[1] for both in found.values()]
    whole = np.ptp(np.concatenate(smooth))
    apart = len(found) > 1 and whole > 2 * sum(np.ptp(values) for values in smooth)
    axes = dict.fromkeys(found, axis)
    if apart:
        axes["teacher_loss"] = axis.twinx()
    looks = {"dln_loss": ("tab:brown", "-"), "teacher_loss": ("tab:cyan", DASHES)}
    for name, both in found.items():
        _noisy(axes[name], *both, looks[name][0], names[name], looks[name][1])
        if apart:
            _owned(axes[name], f"{kind} of the {names[name]}", looks[name][0])
    if not apart:
        axis.set_ylabel(kind)
        values = np.concatenate(smooth)
        if values.min() > 0 and values.max() > 20 * values.min():
            _logarithmic(axis, values)
    _legend_of(*dict.fromkeys(axes.values()))


def _read_run(run):
    """-> lines of training, lines of validation, the object of result.json, {} of a run that has
    not ended.   Error: no such run"""
    if not (run / "metrics.jsonl").is_file():
        raise Error(f"{run} is not the folder of a run: it has no metrics.jsonl.")
    lines = list(_whole_lines((run / "metrics.jsonl").read_text()))
    train = [entry for entry in lines if "loss" in entry]
    valid = [entry for entry in lines if "valid_loss" in entry]
    result = read_json(run / "result.json") if (run / "result.json").exists() else {}
    return train, valid, result


def _whole_lines(text):
    """The objects of metrics.jsonl; a killed run may have left half a line"""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def _values(lines, name):
    """-> steps, values, of the lines that have such a finite number"""
    pairs = [(entry["step"], entry.get(name, np.nan)) for entry in lines]
    finite = [pair for pair in pairs if np.isfinite(pair[1])]
    return np.array(finite, "float64").reshape(-1, 2).T


def _smooth(steps, values):
    """-> steps, running means over a fiftieth of them"""
    width = max(1, len(values) // 50)
    smooth = np.convolve(values, np.ones(width) / width, "valid") if len(values) else values
    return steps[len(steps) - len(smooth) :], smooth


def _noisy(axis, steps, values, colour, label, style="-"):
    """Values faint, their running mean over them"""
    axis.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
    axis.plot(*_smooth(steps, values), color=colour, ls=style, label=label)


def _owned(axis, label, colour):
    """An axis that belongs to the line of this colour"""
    axis.ticklabel_format(useOffset=False)
    axis.set_ylabel(label, color=colour)
    axis.tick_params(axis="y", which="both", colors=colour)


def _legend_of(*axes):
    """One legend of axes that share a panel, above it"""
    handles = [handle for axis in axes for handle in axis.get_legend_handles_labels()[0]]
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": len(handles)}
    axes[-1].legend(handles=handles, fontsize="small", frameon=False, **where)


def _widen(axis, least):
    """At least so much from bottom to top: what hardly changes is to look like it"""
    bottom, top = axis.get_ylim()
    if top - bottom < least:
        middle = (top + bottom) / 2
        axis.set_ylim(middle - least / 2, middle + least / 2)


def _logarithmic(axis, values):
    """A logarithmic scale over the values, of a decade at least, with plain numbers"""
    middle, half = np.sqrt(values.min() * values.max()), np.sqrt(values.max() / values.min())
    half = max(1.1 * half, np.sqrt(10))
    axis.set(yscale="log", ylim=(middle / half, middle * half))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if half < 20 else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


# Several runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as it is compared with others: its name, config.json, and as _read_run"""

    name: str
    config: dict
    train: list
    valid: list
    result: dict


def compare(runs, path):
    """The validation losses of several runs in one picture, those that differ in their seed only as
    one line; -> a table of them, as text

    Error: a folder is no run or comes twice; the runs are of different data.
    """
    groups = grouped(runs)
    figure, axis = plt.subplots(figsize=(7.5, 5))
    lines, validated = [], []
    for i, (name, group) in enumerate(groups.items()):
        colour = f"C{i % 10}"
        training = _mean([_smooth(*_values(run.train, "loss")) for run in group])
        axis.plot(*training, color=colour, alpha=0.4, lw=0.9, ls=DASHES)
        each = [_values(run.valid, "valid_loss") for run in group]
        mean = _mean(each)
        style = "-" if i < 10 else "-."
        (line,) = axis.plot(*mean, style, color=colour, lw=1.8, label=name)
        if len(group) > 1:
            line.set_label(f"{name}, {len(group)} seeds")
            for own in each:
                axis.plot(*own, color=colour, lw=0.6, alpha=0.6)
                axis.plot(*_least(*own), "o", color=colour, ms=3)
        axis.plot(*_least(*mean), "o", color=colour, ms=7, mec="w", mew=0.6, zorder=3)
        lines.append(line)
        validated += [values for _, values in each]
    validated = np.concatenate(validated)
    if validated.size:
        drawn = np.concatenate([line.get_ydata() for line in axis.lines])
        room = 0.08 * max(np.ptp(validated), 0.1)
        axis.set_ylim(np.nanmin(drawn) - room, min(axis.get_ylim()[1], validated.max() + room))
    axis.set(xlabel="step", ylabel="loss (nats)")
    axis.grid(alpha=0.3)
    if any("valid_perplexity" in entry for run in _all(groups) for entry in run.valid):
        _perplexities(axis)
    gray = {"color": "dimgray"}
    kinds = [
        Line2D([], [], **gray, lw=1.8, label="validation"),
        Line2D([], [], **gray, alpha=0.5, lw=0.9, ls=DASHES, label="training"),
        Line2D([], [], **gray, marker="o", ms=5, ls="", label="least validation loss"),
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncol": 3}
    axis.legend(handles=[*lines, *kinds], fontsize="small", frameon=False, **place)
    _save(figure, path)
    return table(groups)


def _perplexities(axis):
    """The same scale on the right, as perplexity"""
    bottom, top = axis.get_ylim()
    right = axis.twinx()
    right.set(ylabel="perplexity", yscale="log", ylim=np.exp([bottom, min(top, 700)]))
    wide = top - bottom > 2
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
    right.yaxis.set_major_formatter("{x:,.10g}")
    right.yaxis.set_minor_formatter(NullFormatter())


def grouped(runs):
    """Folders of runs -> {name: [Run]}: runs that differ in their seed only are together

    Error: as `compare`.
    """
    where = [run.resolve() for run in runs]
    names = [folder.name for folder in where]
    kinds, data = {}, {}
    for run, folder, name in zip(runs, where, names, strict=True):
        if where.count(folder) > 1:
            raise Error(f"{run} is given twice.")
        parts = _read_run(run)
        config = _config(run)
        data.setdefault((config["data"], config["data_checksum"]), run)
        name = name if names.count(name) == 1 else str(run)
        own = Run(name, config, *parts)
        kind, again = _kind(config), 0
        while any(config["seed"] == other.config["seed"] for other in kinds.get((kind, again), [])):
            again += 1  # a run that was repeated is no further seed
        kinds.setdefault((kind, again), []).append(own)
    if len(data) > 1:
        (one, _), (other, _) = list(data)[:2]
        a, b = list(data.values())[:2]
        what = f"{one} and {other}" if one != other else f"two versions of {one}"
        raise Error(f"{a} and {b} are on different data, {what}: their losses do not compare.")
    members = list(kinds.values())
    common = [_common([run.name for run in group]) for group in members]
    named = {}
    for name, group in zip(common, members, strict=True):
        alone = name and common.count(name) == 1
        named[name if alone else ", ".join(run.name for run in group)] = group
    return named


def _config(run):
    """The object in a run's config.json.   Error: there is none"""
    config = read_json(run / "config.json")
    if not (isinstance(config, dict) and {"data", "data_checksum", "seed"} <= config.keys()):
        raise Error(f"{run / 'config.json'} is not as train.py writes it.")
    return config


# What may differ between the seeds of a run: where it ran; the vocabulary follows from the data
SEEDWISE = ("seed", "machine", "device", "threads", "data_dir", "vocabulary")


def _kind(config):
    """Settings without the seed, as text; the run whose weights are taken again is itself one"""
    config = {name: value for name, value in config.items() if name not in SEEDWISE}
    teaching = config.get("teaching") or {}
    if teaching.get("replay") and (Path(teaching["replay"]) / "config.json").is_file():
        replayed = _kind(_config(Path(teaching["replay"])))
        config["teaching"] = teaching | {"replay": replayed}
    return json.dumps(config, sort_keys=True)


def _common(names):
    """a-b-0, a-b-1 -> a-b; "" where they have nothing in common"""
    if len(names) == 1:
        return names[0]
    first, *others = (re.split(r"([-_. ])", name) for name in names)  # separators at odd places
    if all(len(other) == len(first) for other in others):
        places = [i for i in range(0, len(first), 2) if all(o[i] == first[i] for o in others)]
        return "".join(first[i - 1] * (i > places[0]) + first[i] for i in places)
    return "-".join(part for part in first[::2] if all(part in other[::2] for other in others))


def _all(groups):
    """The runs in {name: [Run]}"""
    return [run for group in groups.values() for run in group]


def _mean(series):
    """[(steps, values)] -> the steps that all have, mean values there; empty ones do not count"""
    series = [(steps, values) for steps, values in series if steps.size]
    if not series:
        return np.zeros((2, 0))
    there = functools.reduce(np.intersect1d, [steps for steps, _ in series])
    return there, np.mean([values[np.isin(steps, there)] for steps, values in series], axis=0)


def table(groups):
    """{name: [Run]} -> the table of `compare`, as text"""
    runs = _all(groups)
    of_text = any("valid_perplexity" in entry for run in runs for entry in run.valid)
    what = "perplexity" if of_text else "loss"
    head = ["", "seeds", "steps", f"best valid {what}", "at step", f"last valid {what}"]
    head += [f"test {what}", *([] if of_text else ["test accuracy"]), "minutes"]
    rows = [head]
    for name, group in groups.items():
        best = [_least(*_values(run.valid, f"valid_{what}")) for run in group]
        last = [_values(run.valid, f"valid_{what}")[1][-1:] for run in group]
        seconds = [run.result.get("seconds") or _latest(run, "seconds") for run in group]
        seeds = " ".join(str(run.config["seed"]) for run in group)
        steps = [run.result.get("step") or _latest(run, "step") for run in group]
        row = [name, seeds, _range(steps), _said([value for _, value in best], what)]
        row += [_range([at for at, _ in best]), _said([float(v[0]) for v in last if v.size], what)]
        for asked in (what,) if of_text else (what, "accuracy"):
            tested = [run.result.get(f"test_{asked}", np.nan) for run in group]
            row.append(_said(tested, asked))
        row.append(_said([s / 60 for s in seconds], "minutes"))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(both))
        for both in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    if any(len(group) > 1 for group in groups.values()):
        lines.append("a ± b: mean and sample deviation over the seeds")
    return "\n".join(line.rstrip() for line in [*lines, *_unlike(runs)])


def _unlike(runs):
    """A sentence for each thing by which the scores of these runs do not compare"""
    names = ("eval_protocol", "eval_samples", "select")
    recipes = [run.config.get("recipe", {}) for run in runs]
    values = {name: [recipe.get(name) for recipe in recipes] for name in names}
    values["max_length"] = [run.config.get("max_length") for run in runs]
    for name, own in values.items():
        different = list(dict.fromkeys(map(str, own)))
        if len(different) > 1:
            yield f"not evaluated alike: {name} is {', '.join(different)}"


def _latest(run, name):
    """The largest number that the lines of a run have under this name; -inf without one"""
    return _values(run.train + run.valid, name)[1].max(initial=-np.inf)


def _least(steps, values):
    """-> step and value of the minimum; nan, nan of none"""
    return (steps[values.argmin()], values.min()) if steps.size else (np.nan, np.nan)


def _range(values):
    """Whole numbers as 40, or 20-40"""
    values = sorted({int(value) for value in values if np.isfinite(value)})
    return f"{values[0]:,}" + f"-{values[-1]:,}" * (len(values) > 1) if values else "-"


def _said(values, what):
    """Numbers as mean ± sample deviation; how many of the runs have one, where not all do"""
    there = [value for value in values if np.isfinite(value)]
    if not there:
        return "-"
    mean = np.mean(there)
    of_size = 3 if mean < 10 else 2 if mean < 1000 else 0
    decimals = {"perplexity": of_size, "minutes": 1}.get(what, 4)
    text = f"{mean:,.{decimals}f}"
    if len(there) > 1:
        text += f" ± {np.std(there, ddof=1):,.{decimals}f}"
    return text + f" ({len(there)} of {len(values)})" * (len(there) < len(values))


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
