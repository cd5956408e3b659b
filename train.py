"""Train a model on a data set: python train.py --model hope --data lra-listops

One explicit loop, in `run`. Everything it does at a step is a pure function of (settings, seed, step), so a run that was
killed and resumed ends with the same bits as one that was not.
"""

import dataclasses
import json
import math
import shlex
import sys
import time
from pathlib import Path

import click
import numpy as np

import data as data_sets
from ref import Error, __version__, backend, network, nn, optim, presets, runs
from ref.files import check_writable, read_json, write_atomically
from ref.options import named, options_of, run_command


def run(settings, out, minutes=None, data_dir=None, resume=False, eval_only=False):
    """Train or resume the run that `settings` (config.json) describes, in folder out; -> what result.json says"""
    check_writable(out)
    xp = backend.select_device(settings["device"])
    data = data_sets.load(settings["data"], data_dir, settings["data_seed"])
    cfg, recipe = network_config(settings, data), presets.Recipe(**settings["recipe"])
    seed = settings["seed"]
    if not resume:
        write_atomically(out / "config.json", (json.dumps(settings, indent=2) + "\n").encode())

    params = network.init(cfg, np.random.default_rng(seed), settings["dtype"])
    groups = optimiser_groups(params, cfg, recipe)
    moments = optim.adamw_init({name: p for name, p in params.items() if groups[name].lr})
    steps_of_epochs = math.ceil(recipe.epochs * data_sets.steps_per_epoch(data, recipe.batch_size))
    state = {
        "step": 0,
        "total": recipe.steps or steps_of_epochs,
        "seconds": 0.0,
        "fixed": not settings["fit_minutes"],
    }
    if resume:
        params, moments, state = runs.load_checkpoint(
            out / "checkpoint.safetensors", params, moments
        )
    step, total, before = state["step"], state["total"], time.monotonic() - state["seconds"]
    describe(settings, params, cfg, recipe, data, total, xp)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    moments = {name: backend.to_device(p, xp) for name, p in moments.items()}
    if eval_only:
        return evaluate_test(params, cfg, data, recipe, state)

    log, budget = runs.Log(out, step), runs.Budget(minutes, state["fixed"])
    saved_at = -math.inf
    batches = data_sets.train_batches(data, recipe.batch_size, seed, start=step)
    with runs.Interrupt() as interrupt, runs.Progress(step, total) as progress:
        while True:
            seconds = time.monotonic() - before
            if step and (step % recipe.eval_every == 0 or step == total) and log.evaluated < step:
                loss, accuracy = evaluate(
                    params, cfg, data.valid, data, recipe.batch_size, interrupt
                )
                if not interrupt.asked:
                    log.write(
                        step=step,
                        valid_loss=loss,
                        valid_accuracy=accuracy,
                        seconds=round(seconds, 2),
                    )
                    progress.say(
                        f"step {step}: validation loss {loss:.4f}, accuracy {accuracy:.4f}"
                    )
            stop = interrupt.asked or step >= total or budget.spent(seconds)
            due = step % recipe.save_every == 0 if recipe.save_every else seconds - saved_at > 30
            if stop or due:
                state = {"step": step, "total": total, "seconds": seconds, "fixed": budget.fixed}
                runs.save_checkpoint(out / "checkpoint.safetensors", params, moments, state)
                saved_at = seconds
            if stop:
                break

            epoch, batch = next(batches)
            x, targets, lengths = (backend.to_device(a, xp) for a in batch)
            step += 1
            rng = np.random.default_rng([seed, step])

            logits, cache = network.forward(params, x, cfg, lengths, rng)
            loss, loss_cache = nn.softmax_cross_entropy_forward(logits, targets)
            _, grads = network.backward(nn.softmax_cross_entropy_backward(1.0, loss_cache), cache)

            loss, norm = backend.item(loss), optim.gradient_norm(grads)
            if not math.isfinite(loss + norm):
                raise Error(
                    f"the loss is {loss} and the gradient's norm {norm} at step {step}; nothing after step "
                    f"{state['step']} is saved. Try again with a smaller --lr, or with --clip."
                )
            if recipe.clip:
                grads = optim.clip(grads, norm, recipe.clip)
            schedule = optim.warmup_cosine(step, total, recipe.warmup)
            optim.adamw_update(params, grads, moments, step, groups, schedule)
            params |= network.running_statistics(params, cache)

            accuracy = backend.item((logits.argmax(axis=-1) == targets).mean())
            seconds = time.monotonic() - before
            log.add(
                step, loss, accuracy, norm, schedule * recipe.lr, epoch, seconds, recipe.log_every
            )
            total = budget.steps(step, total, seconds)
            progress.update(step, total, *log.running())

    if interrupt.asked:
        print(
            f"Stopped at step {step} of {total}; everything is saved. To go on:\n    {resume_command(out, data_dir)}"
        )
        return None
    result = evaluate_test(params, cfg, data, recipe, state)
    write_atomically(out / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    draw_curves(out)
    return result


# The pieces of a run


def network_config(settings, data):
    """The network.Config of a run's settings on a data set"""
    recipe = presets.Recipe(**settings["recipe"])
    layer = network.model_module(settings["model"]).Config(**settings["layer"])
    return network.Config(
        model=settings["model"],
        layer=layer,
        n_layers=recipe.n_layers,
        d_input=data.d_input,
        d_output=data.d_output,
        tokens=data.tokens,
        decoder=recipe.decoder,
        final_norm=layer.prenorm,
    )


def optimiser_groups(params, cfg, recipe):
    """name -> optim.Group of every parameter"""
    rates = {
        "main": optim.Group(recipe.lr, recipe.weight_decay),
        "ssm": optim.Group(recipe.ssm_lr, recipe.ssm_weight_decay),
        "dt": optim.Group(recipe.dt_lr),
        "frozen": optim.Group(0.0),
    }
    return {name: rates[group] for name, group in network.groups(params, cfg).items()}


def evaluate(params, cfg, split, data, batch_size, interrupt=None):
    """-> mean loss in nats and accuracy over all samples of a split"""
    loss = correct = 0.0
    xp = backend.array_module(params["encoder.weight"])
    for batch in data_sets.eval_batches(split, data, batch_size):
        if interrupt is not None and interrupt.asked:
            break
        x, targets, lengths = (backend.to_device(a, xp) for a in batch)
        logits, _ = network.forward(params, x, cfg, lengths)
        batch_loss, _ = nn.softmax_cross_entropy_forward(logits, targets)
        loss += backend.item(batch_loss) * len(batch.targets)
        correct += backend.item((logits.argmax(axis=-1) == targets).sum())
    return loss / len(split), correct / len(split)


def evaluate_test(params, cfg, data, recipe, state):
    """Accuracy on the test split with the trivial baselines beside it"""
    loss, accuracy = evaluate(params, cfg, data.test, data, recipe.batch_size)
    step, total, seconds = state["step"], state["total"], state["seconds"]
    print(
        f"test accuracy {accuracy:.4f}, loss {loss:.4f}, after {step} of {total} steps in {seconds / 60:.1f} minutes"
    )
    for name, value in data.baselines.items():
        print(f"    {name}: {value:.4f}")
    result = {"test_accuracy": accuracy, "test_loss": loss, "baselines": data.baselines}
    return result | {"step": step, "steps": total, "seconds": round(seconds, 1)}


def describe(settings, params, cfg, recipe, data, total, xp):
    """Print what will run"""
    count = sum(p.size for p in params.values())
    megabytes = memory_estimate(params, cfg, recipe.batch_size, data.max_length) / 2**20
    device = (
        "cpu" if xp is np else f"cuda ({xp.cuda.runtime.getDeviceProperties(0)['name'].decode()})"
    )
    sizes = ", ".join(f"{len(getattr(data, s)):,} {s}" for s in ("train", "valid", "test"))
    print(f"{settings['model']} on {data.name} ({sizes}; {data.source})")
    print(
        f"{count:,} parameters, {settings['dtype']}, at most about {megabytes:,.0f} MiB, {device}, seed {settings['seed']}"
    )
    print(
        f"{backend.threads()} threads, BLAS core type {backend.blas_core()}, {total:,} steps of {recipe.batch_size}"
    )
    print("to beat: " + ", ".join(f"{name} {value:.4f}" for name, value in data.baselines.items()))


def memory_estimate(params, cfg, batch_size, length):
    """Bytes of a training step on the longest batch: parameters four times, activations as a short batch keeps them"""
    x = np.zeros(
        (1, 64) if cfg.tokens else (1, 64, cfg.d_input),
        "int32" if cfg.tokens else params["encoder.weight"].dtype,
    )
    _, cache = network.forward(params, x, cfg, rng=np.random.default_rng(0))
    own = {id(p.base if p.base is not None else p) for p in params.values()}
    activations = sum(nbytes for key, nbytes in _arrays(cache).items() if key not in own)
    return 4 * sum(p.nbytes for p in params.values()) + 1.5 * activations * batch_size * length / 64


def _arrays(tree):
    """id -> bytes of every array in nested tuples, lists and dicts"""
    if isinstance(tree, np.ndarray):
        owner = tree.base if isinstance(tree.base, np.ndarray) else tree
        return {id(owner): owner.nbytes}
    children = (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    )
    found = {}
    for child in children:
        found |= _arrays(child)
    return found


def resume_command(out, data_dir):
    """The command that goes on with a run"""
    place = f" --data-dir {shlex.quote(data_dir)}" if data_dir else ""
    return f"python train.py --resume {shlex.quote(str(out))}{place}"


def draw_curves(out):
    """curves.png, when matplotlib is there"""
    try:
        from ref import plots
    except ImportError:
        print(
            "curves.png is not drawn: matplotlib is not installed (the extra `plot`).",
            file=sys.stderr,
        )
    else:
        plots.curves(out, out / "curves.png")


# Command line

RUN_SETTINGS = ("model", "data", "preset", "seed", "data_seed", "dtype", "device")


def main(arguments=None):
    """-> exit code: 0, 2 for wrong usage, 1 for everything else that failed"""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    backend.keep_freed_memory()
    return run_command(command(named(arguments, "--model")), arguments, "train.py")


def command(model):
    """The command with the options of `model`, or of all models when it is not a known one"""
    models = [model] if model in network.MODELS else network.MODELS
    choice, option = click.Choice, click.Option
    minutes = "Train at most so long; without --steps or --epochs the schedule is made to end then."
    options = [
        option(["--model"], type=choice(network.MODELS), help="The model."),
        option(["--data"], type=choice(data_sets.NAMES), help="The data set."),
        option(
            ["--preset"],
            type=choice(presets.PRESETS),
            help="small (default): two cores, ten minutes; paper.",
        ),
        option(
            ["--device"],
            type=choice(["auto", "cpu", "cuda"]),
            help="auto (default): a GPU where one works.",
        ),
        option(["--dtype"], type=choice(["float32", "float64"]), help="float32 by default."),
        option(
            ["--seed"],
            type=click.IntRange(0),
            help="Of weights, batches and dropout; 0 by default.",
        ),
        option(
            ["--data-seed"], type=click.IntRange(0), help="Of generated data sets; 0 by default."
        ),
        option(["--threads"], type=click.IntRange(1), help="All cores by default."),
        option(["--minutes"], type=click.FloatRange(0, min_open=True), help=minutes),
        option(
            ["--data-dir"], help="Folder of the data; $REF_DATA_DIR or the user's cache by default."
        ),
        option(["--out"], help="Folder of the run; runs/MODEL-DATA-SEED by default."),
        option(
            ["--resume"],
            metavar="RUN",
            help="Go on with the run in this folder, with its settings.",
        ),
        option(
            ["--eval-only"], is_flag=True, help="With --resume: only evaluate on the test split."
        ),
        option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_version,
            help="Print it.",
        ),
    ]
    layers = [network.model_module(name).Config for name in models]
    return click.Command(
        "train",
        params=options + options_of(presets.Recipe, *layers),
        callback=_train,
        help="""Train a model on a data set.

        Any hyper-parameter of the model's layer or of the recipe is an option; the preset gives the rest.

        Example: python train.py --model hope --data lra-listops --d-model 32 --steps 500
        """,
    )


def _version(context, option, value):
    if value:
        print(__version__)
        context.exit()


def _train(resume, eval_only, out, minutes, data_dir, threads, **options):
    options = {name: value for name, value in options.items() if value is not None}
    if threads:
        backend.set_threads(threads)
    if resume:
        _resume(Path(resume), options, minutes, data_dir, eval_only)
        return
    if eval_only:
        raise click.UsageError("--eval-only needs --resume RUN: it evaluates a trained network.")
    for name in ("model", "data"):
        if name not in options:
            raise click.UsageError(
                f"--{name} is missing. Example: python train.py --model hope --data lra-listops"
            )
    try:
        settings = make_settings(options, minutes)
    except Error as e:
        raise click.UsageError(str(e)) from e
    out = Path(out or f"runs/{settings['model']}-{settings['data']}-{settings['seed']}")
    if (out / "checkpoint.safetensors").exists() or (out / "config.json").exists():
        raise Error(
            f"{out} holds a run already. Go on with it by --resume {out}, or choose another --out."
        )
    run(settings, out, minutes, data_dir)


def make_settings(options, minutes=None):
    """Everything that decides a run, as config.json keeps it: preset, then the options given"""
    model, data = options["model"], options["data"]
    chosen = presets.preset(model, data, options.get("preset", "small"))
    given = {name: value for name, value in options.items() if name not in RUN_SETTINGS}
    if "epochs" in given and "steps" not in given:
        chosen["steps"] = 0
    chosen |= given
    layer_names = {f.name for f in dataclasses.fields(network.model_module(model).Config)}
    layer = network.model_module(model).Config(
        **{k: v for k, v in chosen.items() if k in layer_names}
    )
    recipe = presets.Recipe(**{k: v for k, v in chosen.items() if k not in layer_names})
    return {
        "version": __version__,
        "model": model,
        "data": data,
        "preset": options.get("preset", "small"),
        "layer": dataclasses.asdict(layer),
        "recipe": dataclasses.asdict(recipe),
        "seed": options.get("seed", 0),
        "data_seed": options.get("data_seed", 0),
        "dtype": options.get("dtype", "float32"),
        "device": options.get("device", "auto"),
        "fit_minutes": bool(minutes) and not given.keys() & {"steps", "epochs"},
        "machine": runs.machine(),
    }


def _resume(out, options, minutes, data_dir, eval_only):
    if options:
        names = ", ".join("--" + name.replace("_", "-") for name in options)
        raise click.UsageError(
            f"--resume takes its settings from the run; it cannot be combined with {names}."
        )
    settings = read_json(out / "config.json")
    for what, then in settings["machine"].items():
        now = runs.machine()[what]
        if now != then:
            print(
                f"{what} was {then} and is {now}: results will differ in rounding.", file=sys.stderr
            )
    run(settings, out, minutes, data_dir, resume=True, eval_only=eval_only)


if __name__ == "__main__":
    sys.exit(main())
