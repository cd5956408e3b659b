"""`python -m ref`: check, look at and measure the models. Only the command line."""

import sys
from pathlib import Path

import click

from ref import Error, network
from ref.options import all_named, options_of, run_command

CASE_MODELS = (*network.MODELS, "l2t-student", "etsc", "l2t")  # whose cases there are


@click.group(no_args_is_help=True)
def main():
    """A reference implementation of sequence models: check another implementation against it, and
    look at it.

    Example: python -m ref verify theirs.safetensors
    """


def _model_command(*args, **kwargs):
    """A command whose further options are the fields of its models' Configs"""

    class ModelCommand(click.Command):
        def get_params(self, context):
            known = CASE_MODELS if self.name in ("case", "verify") else network.MODELS
            models = [m for m in all_named(sys.argv, "--model") if m in known]
            models = models if self.name == "plot" else models[-1:]  # elsewhere the last one holds
            modules = [_module(m) for m in models or network.MODELS[:1]]
            if self.name == "verify" and not models:
                modules = []  # of files
            configs = [c for m in modules for c in (m.Config, *_part_configs(m, self.name))]
            return super().get_params(context) + options_of(*configs)

    return main.command(*args, cls=ModelCommand, **kwargs)


def _part_configs(module, command):
    """The further Configs that parts of a model have, in cases"""
    if command not in ("case", "verify"):
        return ()
    outer = [network.Config] if hasattr(module, "PUBLISHED") else []
    return *getattr(module, "CASE_CONFIGS", {}).values(), *outer


def _module(model):
    """The module of a model, also of one that only cases have"""
    if model in network.MODELS:
        return network.model_module(model)
    from ref import cases

    return cases.module_of(model)


def _given(settings):
    return {name: value for name, value in settings.items() if value is not None}


def _check_config(config, settings):
    """UsageError for settings that a model's Config refuses"""
    from ref.presets import check_kinds

    known = config.__dataclass_fields__
    try:
        check_kinds(settings, config)  # the option of a field may be another model's
        config(**{name: value for name, value in settings.items() if name in known})
    except Error as e:
        raise click.UsageError(str(e)) from e


def _conversion_options(command):
    """How long convolutions are converted"""
    for option in (
        click.option(
            "--dtype", type=click.Choice(["float32", "float64"]), help="To compute in. [as trained]"
        ),
        click.option(
            "--hankel",
            type=click.Choice(["triangle", "rectangle"]),
            help="hankel: the matrix that is reduced. rectangle: closest over the horizon; "
            "triangle: balanced truncation. [rectangle]",
        ),
        click.option(
            "--tol",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="hankel: the least rank with this relative error in every channel.",
        ),
        click.option("--rank", type=click.IntRange(1), help="hankel: real states a channel. [32]"),
        click.option(
            "--horizon",
            type=click.IntRange(1),
            help="Positions that can be decoded. [convert: the training window; generate: as many "
            "as are asked for]",
        ),
    ):
        command = option(command)
    return command


def _check_method(method, how):
    """UsageError for an option that a method of conversion does not take"""
    taken = {"hankel": ("rank", "tol", "hankel"), "adam": ("rank",)}.get(method, ())
    for name in ("rank", "tol", "hankel"):
        if name in how and name not in taken:
            raise click.UsageError(f"--{name} is not for --method {method}, but for hankel.")


model_option = click.option(
    "--model", type=click.Choice(network.MODELS), required=True, help="The model."
)


@_model_command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--callable", "spec", help="Instead of files: a function, as module:name.")
@click.option("--model", type=click.Choice(CASE_MODELS), help="callable: the model.")
@click.option("--part", help="callable: scan, operator, mixer, block, network, ...; see case.")
@click.option("--dtype", help="callable: float64, float32, float16 or bfloat16. [float32]")
@click.option("--framework", help="callable: numpy, torch, torch:cuda, cupy or jax. [numpy]")
@click.option("--batch", "-B", type=click.IntRange(1), help="callable: batch size. [2]")
@click.option("--length", "-L", type=click.IntRange(1), help="callable: sequence length. [24]")
@click.option("--seed", type=click.IntRange(0), help="callable: the first one. [0]")
@click.option("--seeds", type=click.IntRange(1), help="callable: how many. [1]")
@click.option("--initial-state", is_flag=True, help="callable: it goes on from a state.")
@click.option("--sweep", is_flag=True, help="callable: lengths 1 to 2048, widths odd and even.")
@click.option("--json", "output", help="Also write the report here, as JSON; -: nothing but it.")
@click.option("--peers", is_flag=True, help="Instead of files: other people's implementations.")
@click.option("--quiet", is_flag=True, help="Only tensors that fail, and the count.")
def verify(files, spec, output, quiet, **given):
    """Recompute case files in float64 and report each tensor:
    normalised error, what is allowed, the worst element. Where one is wrong and, if that is
    certain, how.

    With --callable a function of yours is called and compared; it takes and returns what
    ref.cases.verify_callable says. With --model the fields of its Config are options too.

    Exit code 1 when any tensor of any file fails; the other files are checked all the same.

    Example: python -m ref verify mine/*.safetensors

    Example: python -m ref verify --callable my_module:my_scan --model longhorn --part scan
    --framework torch -B 2 -L 1021 --d-model 64 --d-state 16
    """
    given = {n: v for n, v in given.items() if v not in (None, False)}
    if given.pop("peers", False):
        if files or spec or given:
            raise click.UsageError("--peers goes with --json and --quiet only.")
        from ref import peers

        return peers.command(output, quiet)
    if bool(files) == bool(spec):
        raise click.UsageError("give case files, or --callable MODULE:FUNCTION.")
    if files and given:
        option = sorted(given)[0].replace("_", "-")
        raise click.UsageError(f"--{option} is for --callable; a file says it itself.")
    show = (lambda text: None) if output == "-" else print
    reports = (
        _verify_callable(spec, given, quiet, show) if spec else _verify_files(files, quiet, show)
    )
    failed = sum(not report.ok for report in reports)
    if len(files) > 1:
        show(f"{len(files) - failed} of {len(files)} files agree")
    if output:
        _write_json(output, reports)
    return int(failed > 0)


def _verify_files(files, quiet, show):
    """-> Reports, each shown when it is there"""
    from ref import verify

    reports = []
    for path in files:
        reports.append(verify.report_file(path))
        show(reports[-1].text(quiet))
    return reports


def _verify_callable(spec, given, quiet, show):
    """-> [Report or Sweep]"""
    from ref import verify
    from ref.frameworks import imported

    for name in ("model", "part"):
        if name not in given:
            raise click.UsageError(f"--callable needs --{name}.")
    names = {"batch": "B", "length": "L"}
    known = ("model", "part", "dtype", "framework", "seed", "seeds", "initial_state", *names)
    own = {names.get(n, n): given.pop(n) for n in known if n in given}
    sweep = given.pop("sweep", False)
    if sweep and own.keys() & {"B", "L"}:
        raise click.UsageError("--sweep has its own batch sizes and lengths.")
    f = imported(spec)
    if sweep:
        from ref.sweep import over_shapes

        report = over_shapes(f, settings=given, label=spec, show=show, **own)
        show(report.closing(quiet))
    else:
        report = verify.verify_callable(f, settings=given, label=spec, **own)
        show(report.text(quiet))
    return [report]


def _write_json(output, reports):
    import json

    from ref.files import write_atomically

    ok = all(report.ok for report in reports)
    whole = {"format": "ssm-report-1", "ok": ok, "reports": [r.as_dict() for r in reports]}
    if output == "-":
        print(json.dumps(whole))
    else:
        write_atomically(Path(output), (json.dumps(whole) + "\n").encode())


@_model_command()
@click.option("--model", type=click.Choice(CASE_MODELS), required=True, help="The model.")
@click.option(
    "--part",
    required=True,
    help="operator, mixer, block, network; scan, of d_model channels; of etsc: solve; of l2t: "
    "features, dln, teacher, student-loss, unrolled (of length features).",
)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="The file.")
@click.option("--precision", default="float64", help="float64, float32, float16 or bfloat16.")
@click.option("--batch", "-B", default=2, type=click.IntRange(1), help="Batch size.")
@click.option("--length", "-L", default=24, type=click.IntRange(1), help="Sequence length.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of inputs and parameters.")
@click.option(
    "--initial-state",
    is_flag=True,
    help="It goes on from a state: scan, mixer, block or network of mamba or longhorn.",
)
def case(model, part, output, precision, batch, length, seed, initial_state, **settings):
    """Write a case from the reference, for another implementation to be checked against.

    The last options are the fields of the Config of --model (without it, of hope), and those of a
    network.

    Example: python -m ref case --model hope --part mixer --conv causal --d-model 8 -o
    case.safetensors
    """
    from ref import cases
    from ref.backend import check_choice

    check_choice("precision", precision, cases.PRECISIONS)
    config = cases.config_class(_module(model), part)
    fields = config.__dataclass_fields__
    usual = {name: n for name, n in {"d_model": 8, "d_state": 16}.items() if name in fields}
    settings = usual | _given(settings)
    _check_config(config, settings)
    given = batch, length, precision, seed, initial_state
    made = cases.make_case(model, part, settings, *given)
    cases.write_case(output, made)
    print(f"{output}: {model} {part}, {precision}, {len(made.tensors)} tensors")


@main.command()
@click.argument("models", nargs=-1, type=click.Choice(("nn", *network.MODELS)))
@click.option("--seed", default=0, type=click.IntRange(0), help="Of all arrays and directions.")
def gradcheck(models, seed):
    """Compare every gradient with the definition of a derivative, in float64. Without names:
    everything.

    Example: python -m ref gradcheck nn hope
    """
    from ref import gradcheck

    failed = checked = 0
    for name in models or ("nn", *network.MODELS):
        for label, errors in gradcheck.errors_of(name, seed):
            worst = max(errors, key=errors.get)
            ok = errors[worst] <= gradcheck.TOLERANCE
            failed, checked = failed + (not ok), checked + len(errors)
            print(f"{'ok  ' if ok else 'FAIL'}  {name} {label}: {errors[worst]:.1e} ({worst})")
    print(f"{checked} gradients checked, tolerance {gradcheck.TOLERANCE:g}")
    return int(failed > 0)


@_model_command()
@model_option
@click.option("--length", "-L", default=1024, type=click.IntRange(1), help="Sequence length.")
def info(model, length, **settings):
    """Parameters, state, operations and bytes per token of a model's block.

    The last options are the fields of the Config of --model (without it, of hope).

    Example: python -m ref info --model hope --conv causal --d-model 128
    """
    from ref import info

    _check_config(_module(model).Config, _given(settings))
    print(info.describe(model, _given(settings), length))


@_model_command()
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "models",
    multiple=True,
    type=click.Choice(network.MODELS),
    help="A model at initialisation; several stand side by side.",
)
@click.option(
    "--what",
    required=True,
    type=click.Choice(["curves", "kernel", "hankel", "matrix"]),
    help="The picture.",
)
@click.option("--length", "-L", default=256, type=click.IntRange(1), help="Sequence length.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of the initialisation.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="The PNG; WHAT.png, in RUN if there is one.",
)
def plot(runs, models, what, length, seed, output, **settings):
    """Draw a PNG: the curves of a RUN; kernel, Hankel singular values or matrix of a RUN or of
    models as initialised. The curves of several RUNs come in one picture, with a table.

    The last options are the fields of the Config of --model (without it, of hope).

    Example: python -m ref plot --model hope --model s4 --model s4d --what hankel
    """
    from ref import plots

    if bool(runs) == bool(models):
        raise click.UsageError("give either folders of runs or --model.")
    if len(runs) > 1:
        if what != "curves":
            raise click.UsageError(f"--what {what} is of one run; several are for --what curves.")
        output = output or Path("curves.png")
        print(plots.compare(runs, output))
        print(output)
        return
    run = runs[0] if runs else None
    output = output or (run or Path()) / f"{what}.png"
    for model in models:
        _check_config(_module(model).Config, _given(settings))
    plots.draw(what, run, models, _given(settings), length, seed, output)
    print(output)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="What to go on from; nothing: from a line's end.")
@click.option("--tokens", default=500, type=click.IntRange(0), help="How many to add. [500]")
@click.option("--temperature", default=1.0, help="Below 1 bolder, 0: always the likeliest. [1]")
@click.option("--top-k", default=0, help="Only among the K likeliest tokens; 0: all. [0]")
@click.option("--top-p", default=1.0, help="Only among the likeliest that make up P. [1]")
@click.option("--seed", default=0, type=click.IntRange(0), help="Of the choices. [0]")
@click.option(
    "--method",
    type=click.Choice(["auto", "exact", "hankel", "convolution"]),
    default="auto",
    help="How long convolutions are decoded. auto: by the model's own recurrent form, or exact; "
    "exact, hankel: converted, see `convert`; convolution: all again for each token. [auto]",
)
@_conversion_options
def generate(run, prompt, tokens, temperature, top_k, top_p, seed, method, **how):
    """Print text from the language model of a RUN: a prompt and what it goes on with, as it comes.

    A token costs the same time and memory however long the text is (but for --method convolution).
    Ctrl-C ends it.

    Example: python -m ref generate runs/mamba-shakespeare-char-0 --prompt "ROMEO:" --top-p 0.9
    """
    from ref import generate

    how = _given(how)
    if "horizon" in how and method not in ("exact", "hankel"):
        raise click.UsageError("--horizon is for --method exact or hankel.")
    _check_method(method, how)
    generate.generate(run, prompt, tokens, temperature, top_k, top_p, seed, method, **how)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["exact", "hankel", "adam"]),
    default="exact",
    help="exact, to rounding; hankel: of fewer states; adam: by gradient descent. [exact]",
)
@_conversion_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Also write it: safetensors.")
def convert(run, method, horizon, output, **how):
    """Turn the long convolutions of a RUN's language model into recurrences, and print for each
    filter the size of the state, its errors and bounds, and what a token costs beside a ring buffer
    of the last inputs.

    Example: python -m ref convert runs/tnn-ptb-0 --method hankel --rank 32
    """
    from ref import convert

    how = _given(how)
    _check_method(method, how)
    convert.convert(run, method, horizon, output, **how)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write it here: a folder.")
@click.option(
    "--layout",
    type=click.Choice(["original", "transformers"]),
    help="Names and config.json of the output. [as read]",
)
@click.option(
    "--shard-mib", default=0, type=click.IntRange(0), help="Size of the output's files; 0: one."
)
def checkpoint(path, output, layout, shard_mib):
    """Print what a published checkpoint of Mamba or Longhorn holds: a folder, its .safetensors file
    or its index; with -o also write it, as float32 or float64, in either layout.

    PATH may be the folder of a run of train.py: that writes its language model for others to load.

    Example: python -m ref checkpoint mamba-130m-hf -o mamba-130m --layout original
    """
    from ref import checkpoints, generate

    if output is None and (layout or shard_mib):
        raise click.UsageError("--layout and --shard-mib are for the output: give -o FOLDER.")
    is_run = (path / "checkpoint.safetensors").exists() and (path / "config.json").exists()
    if is_run:
        params, cfg, _ = generate.load(path)
        count = sum(p.size for p in params.values())
        print(f"{path}: a run of {cfg.model}, {cfg.n_layers} layers, {count:,} parameters")
    else:
        print(checkpoints.inspect(path))
    if output is not None:
        params, cfg = (params, cfg) if is_run else checkpoints.load(path)
        checkpoints.save(output, params, cfg, layout, shard_mib << 20)
        print(output)


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
def audit(names):
    """Differences between papers and published code, computed now: a line of numbers for each;
    with names, what differs and where, too.

    Example: python -m ref audit hope-frozen-h
    """
    from ref import audit

    try:
        audit.check(names)
    except Error as e:
        raise click.UsageError(str(e)) from e
    for i, text in enumerate(audit.lines(names)):
        print(("\n" if names and i else "") + text, flush=True)


@main.command()
@click.argument("models", nargs=-1, type=click.Choice((*network.MODELS, "etsc", "l2t")))
@click.option("--against", type=click.Choice(["torch"]), help="Also time this library's form.")
@click.option("--device", default="cpu", type=click.Choice(["auto", "cpu", "cuda"]), help="Where.")
@click.option("--rounds", default=9, type=click.IntRange(1), help="Rounds that count.")
@click.option(
    "--malloc",
    default="keep",
    type=click.Choice(["keep", "default"]),
    help="Whether glibc keeps freed memory [keep], which speeds PyTorch up, or does as it likes.",
)
@click.option(
    "--what",
    type=click.Choice(["conversion", "decode"]),
    help="etsc: errors and times of the conversions, or of a token. [conversion]",
)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="etsc: the PNG.")
@click.option("--quick", is_flag=True, help="etsc, l2t: small sizes, to try it.")
def bench(models, against, device, rounds, malloc, what, output, quick):
    """Time and memory, interleaved in one process, as ratios. Without names: every model.

    etsc, on its own: the conversion of long convolutions into recurrences, as tables and figure.
    l2t, on its own: what a step costs with each teacher.

    Example: python -m ref bench hope --against torch
    """
    from ref import backend, bench

    if "etsc" in models:
        from ref import bench_etsc

        if models != ("etsc",) or against or device != "cpu":
            raise click.UsageError("etsc is on its own, on the CPU and without --against.")
        if malloc == "keep":
            backend.keep_freed_memory()
        what = what or "conversion"
        bench_etsc.run(what, output or Path(f"etsc-{what}.png"), quick, malloc)
        return
    if what or output or (quick and models != ("l2t",)):
        raise click.UsageError("--what, --output and --quick are for etsc, --quick for l2t too.")
    if "l2t" in models:
        from ref import bench_l2t

        if models != ("l2t",) or against or device != "cpu":
            raise click.UsageError("l2t is on its own, on the CPU and without --against.")
        if malloc == "keep":
            backend.keep_freed_memory()
        bench_l2t.run(rounds, malloc, quick)
        return
    if against:
        try:
            __import__(against)
        except ImportError as e:
            raise Error(f"--against {against}: it is not installed (the extra `peers`).") from e
    if malloc == "keep":
        backend.keep_freed_memory()
    bench.run(models or network.MODELS, against, rounds, device, malloc)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:], "python -m ref"))
