"""Train a model on a data set: python train.py --model hope --data lra-listops

One explicit loop, in `run`. What it does at a step is a pure function of (settings, step), so a run
that was killed and resumed ends with the same bits as one that was not.
"""

import functools
import json
import math
import os
import shlex
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import numpy as np

import data as data_sets
from ref import Error, __version__, backend, network, nn, optim, presets, rounds, runs, teaching
from ref.files import check_writable, remove_leftovers, write_atomically
from ref.options import named, options_of, run_command


@np.errstate(all="ignore")  # the loop itself looks for what is not finite
def run(settings, out, resume_command, resume=False, eval_only=False, download=False, lengths=()):
    """Train or resume the run that `settings` describes, in folder out; -> what result.json says

    lengths: only evaluate a language model, at windows of so many tokens; -> what lengths.json says
    """
    if lengths or not eval_only:
        check_writable(out)
    if settings["threads"]:
        backend.set_threads(settings["threads"])
    xp = backend.select_device(settings["device"])
    data = data_sets.load(
        settings["data"],
        settings["data_dir"] or None,
        settings["data_seed"],
        max_length=settings["max_length"],
        download=download,
    )
    cfg, recipe = network_config(settings, data), presets.Recipe(**settings["recipe"])
    whole, (data, meta) = data, training_part(settings, data, recipe)
    settings = settings | {"layer": asdict(cfg.layer)}
    if data.window:
        settings["max_length"] = data.window  # what a conversion takes for its horizon
    recorded = {"machine": runs.machine(xp), "data_checksum": runs.data_checksum(whole)}
    recorded["vocabulary"] = list(data.vocabulary) if data.window else []
    if resume:
        runs.check_same(settings, recorded)

    seed, checkpoint, best = settings["seed"], out / "checkpoint.safetensors", out / BEST
    params = network.init(cfg, np.random.default_rng(seed), settings["dtype"])
    groups = optimiser_groups(params, cfg, recipe)
    moments = optim.adamw_init({name: p for name, p in params.items() if groups[name].lr})
    state = {"step": 0, "total": planned_steps(recipe, data), "seconds": 0.0, "recent": []}
    state |= {"best": {}, "skipped": 0}
    kept = checkpoint if resume or eval_only else None
    teacher = make_teacher(settings, cfg, groups, data, meta, xp, kept)
    if eval_only or (resume and checkpoint.exists()):  # it may have been killed before the first
        own = params, moments, teaching.tensors_of(teacher.state)
        params, moments, state, tensors = runs.load_checkpoint(checkpoint, *own)
        teacher.state = teaching.restored(teacher.state, tensors, xp)
        if eval_only and state["best"]:
            params, *_ = runs.load_checkpoint(best, params)
    step, total, before = state["step"], state["total"], time.monotonic() - state["seconds"]
    describe(settings, params, cfg, recipe, data, total, xp, teacher)
    params = {name: backend.to_device(p, xp) for name, p in params.items()}
    moments = {name: backend.to_device(p, xp) for name, p in moments.items()}
    if lengths:
        return evaluate_lengths(params, cfg, whole, recipe, lengths, out, state)
    if eval_only:
        test = evaluate(params, cfg, data.test, data, recipe)
        return report(test, data, recipe, state)

    if resume:
        remove_leftovers(out)
    else:
        write_json(out / "config.json", settings | recorded)
    log = runs.Log(out, step, state["recent"], recipe.log_every)
    budget = runs.Budget(settings["minutes"])
    saved_at = -math.inf
    batches = data_sets.train_batches(data, recipe.batch_size, seed, step, recipe.train_stride)
    with runs.Interrupt() as interrupt, runs.Progress(step, total) as progress:
        while True:
            seconds = time.monotonic() - before
            done = step >= total or (step > 0 and budget.spent(seconds))
            passed = step % recipe.eval_every < teacher.steps  # a round may end beyond
            if step and (passed or done) and log.evaluated < step:
                progress.evaluating()
                loss, accuracy = evaluate(params, cfg, data.valid, data, recipe, interrupt)
                if not interrupt.asked:
                    scores = {"loss": loss, "accuracy": accuracy} | text_scores(loss, data)
                    scores = {f"valid_{name}": value for name, value in scores.items()}
                    log.write(step=step, **scores, seconds=round(seconds, 2))
                    progress.say(
                        f"step {step}: validation loss {loss:.4f}{said(loss, data)}, "
                        f"accuracy {accuracy:.4f}"
                    )
                    if recipe.select == "best" and loss < state["best"].get("loss", math.inf):
                        state["best"] = {"step": step, "loss": loss}
                        runs.save_checkpoint(best, params, {}, state)
            stop = done or interrupt.asked
            due = seconds - saved_at > 30
            if recipe.save_every:
                due = step % recipe.save_every < teacher.steps
            if stop or due:
                state |= {"step": step, "total": total, "seconds": seconds, "recent": log.recent}
                learned = teaching.tensors_of(teacher.state)
                runs.save_checkpoint(checkpoint, params, moments, state, learned)
                saved_at = seconds
            if stop:
                break

            drawn = [next(batches) for _ in range(min(teacher.steps, total - step))]
            first, step = step + 1, step + len(drawn)

            def schedule(step, total=total):
                return optim.warmup_cosine(step, total, recipe.warmup)

            if teacher.in_rounds:
                own = params, moments, [batch for _, batch in drawn]
                params, moments, lines = teacher.round(*own, first, total, schedule)
            else:
                ((_, batch),) = drawn
                number = step - state["skipped"]
                own = params, moments, batch, step, number, total, schedule(number)
                lines = [teaching.train_step(*own, teacher, cfg, recipe, groups, seed)]

            seconds = time.monotonic() - before
            for at, (line, (epoch, _)) in enumerate(zip(lines, drawn, strict=True), first):
                loss, norm = line["loss"], line["gradient_norm"]
                if not math.isfinite(loss + norm) and recipe.on_nan == "stop":
                    raise Error(
                        f"the loss is {loss} and the gradient's norm {norm} at step {at}; the last "
                        f"checkpoint is of step {state['step']}. {runs.DIVERGED}"
                    )
                rate = schedule(at - state["skipped"])
                more = {"lr": rate * recipe.lr, "epoch": epoch}
                if math.isfinite(loss + norm):
                    log.add(at, **line, **more, seconds=round(seconds, 2))
                else:
                    state["skipped"] += 1
                progress.update(at, total, *log.running())
            total = budget.total(step, total, seconds)

        progress.evaluating()
        if state["best"]:
            params, *_ = runs.load_checkpoint(best, params)
            params = {name: backend.to_device(p, xp) for name, p in params.items()}
        test = evaluate(params, cfg, data.test, data, recipe, interrupt)

    if interrupt.asked:
        print(f"Stopped after step {step}; everything is saved. To go on:\n    {resume_command}")
        return None
    result = report(test, data, recipe, state)
    quirks = teaching.quirks_on(settings["teaching"], recipe)
    if settings["teaching"] or quirks:
        result |= {"teacher": settings["teaching"].get("teacher", "none"), "quirks": quirks}
    write_json(out / "result.json", result)
    draw_curves(out)
    if step < total < math.inf:
        longer = f"--minutes {2 * settings['minutes']:g}"
        print(f"The time is over. To train on:\n    {resume_command} {longer}")
    return result


# The pieces of a run


def network_config(settings, data):
    """The network.Config of a run's settings on a data set.   Error: they do not go together"""
    recipe = presets.Recipe(**settings["recipe"])
    usual = "match" if data.documents == 2 else "lm" if data.per_position else "mean"
    decoder = usual if recipe.decoder == "auto" else recipe.decoder
    if decoder == "lm" and not data.per_position:
        raise Error(f"{data.name} has one target a sample, but --decoder lm needs one a position.")
    if decoder != "lm" and data.per_position:
        raise Error(
            f"{data.name} has a target at every position, and --decoder {decoder} does not fit; "
            "expected --decoder lm."
        )
    if recipe.eval_protocol != "stream" and not data.window:
        raise Error(
            f"--eval-protocol {recipe.eval_protocol} is for language models, and {data.name} has "
            "samples."
        )
    if (decoder == "match") != (data.documents == 2):
        raise Error(
            f"{data.name} has {data.documents} document(s) a sample, and --decoder {decoder} does "
            f"not fit; expected --decoder {usual}."
        )
    layer = network.model_module(settings["model"]).Config(**settings["layer"])
    fitted = {"depth": recipe.n_layers, "context": data.max_length}  # where the model asks for them
    if getattr(layer, "l_max", 1) == 0:
        fitted["l_max"] = data.max_length
    own = {field.name for field in fields(layer)}
    layer = replace(layer, **{name: value for name, value in fitted.items() if name in own})
    if getattr(layer, "l_max", data.max_length) < data.max_length:
        raise Error(
            f"--l-max {layer.l_max} is below the {data.max_length} steps of {data.name}; "
            "leave it out to have it follow the data."
        )
    pool_from = data.pool_from if decoder == "mean" else 0
    return presets.network_config(
        settings, layer, decoder, data.d_input, data.d_output, data.tokens, pool_from
    )


def optimiser_groups(params, cfg, recipe):
    """name -> optim.Group of every parameter"""
    rates = {
        "main": optim.Group(recipe.lr, recipe.weight_decay),
        "ssm": optim.Group(recipe.ssm_lr, recipe.ssm_weight_decay),
        "dt": optim.Group(recipe.dt_lr),
        "nodecay": optim.Group(recipe.lr),
        "slow": optim.Group(SLOW),
        "frozen": optim.Group(0.0),
    }
    return {name: rates[group] for name, group in network.groups(params, cfg).items()}


def planned_steps(recipe, data):
    """The number of steps of a run; infinite as long as its minutes have not decided it"""
    if recipe.steps:
        return recipe.steps
    per_epoch = data_sets.steps_per_epoch(data, recipe.batch_size, recipe.train_stride)
    return math.ceil(recipe.epochs * per_epoch) if recipe.epochs else math.inf


def training_part(settings, data, recipe):
    """The data with the part of the training split that is trained on, and the held-out Split of a
    teacher that asks for one.   Error: a part is empty"""
    if recipe.train_size:
        data = data_sets.part(data, recipe.train_size)
    teacher = settings["teaching"]
    if teacher.get("teacher") not in ("hypergrad", "lstm"):
        return data, None
    if teacher["meta_split"] == "tail":
        return data_sets.held_out(data, teacher["meta_share"])
    return data, getattr(data, teacher["meta_split"])


def make_teacher(settings, cfg, groups, data, meta, xp, kept=None):
    """What gives the student its loss; see ref.teaching.   kept: the checkpoint that is resumed
    from.   Error: it and the student do not go together"""
    seed, dtype, recipe = settings["seed"], settings["dtype"], presets.Recipe(**settings["recipe"])
    if recipe.double_embedding and not cfg.tied:
        raise Error("--double-embedding is for an embedding that decodes, too: --tied yes.")
    if not settings["teaching"]:
        return teaching.CrossEntropy()
    own = teaching.Config(**settings["teaching"])
    if own.teacher == "static":
        schedule = teaching.replayed(Path(own.replay), kept) if own.weights == "replay" else None
        return teaching.Static(own, seed, schedule)
    if own.teacher == "released":
        teacher = teaching.Released(own, seed, teaching.positions(data), dtype)
    else:
        size = own.meta_batch_size or recipe.batch_size

        def draw(rng):
            return data_sets.drawn(meta, data, size, rng)

        teacher = rounds.Rounds(own, cfg, groups, recipe, draw, seed, dtype)
    teacher.state = teaching.restored(teacher.state, teaching.tensors_of(teacher.state), xp)
    return teacher


def evaluate(params, cfg, split, data, recipe, interrupt=None):
    """-> mean loss in nats and accuracy over the targets of a split, or of eval_samples samples or
    windows of it.   Error: the loss is not finite"""
    loss, correct, count = 0.0, 0, 0
    how = recipe.batch_size, recipe.eval_samples, recipe.eval_protocol
    for batch in data_sets.eval_batches(split, data, *how):
        if interrupt is not None and interrupt.asked:
            break
        batch_loss, right = scores(params, batch, cfg)
        loss += backend.item(batch_loss) * right.size
        correct += backend.item(right.sum())
        count += right.size
    if not math.isfinite(loss):
        raise Error(f"the loss in the evaluation is {loss}. {runs.DIVERGED}")
    return loss / max(count, 1), correct / max(count, 1)


def scores(params, batch, cfg):
    """-> mean loss over the targets of a batch, and which of them are guessed right"""
    logits, targets, _ = network.predict(params, batch, cfg)
    loss, cache = nn.softmax_cross_entropy_forward(logits, targets, consume_logits=True)
    return loss, nn.softmax_cross_entropy_correct(cache)


def evaluated(split, data, recipe):
    """The number of samples or windows that an evaluation looks at, and how many there are"""
    there = data_sets.eval_samples(split, data, recipe.batch_size, recipe.eval_protocol)
    return min(recipe.eval_samples or there, there), there


def evaluate_lengths(params, cfg, data, recipe, lengths, out, state):
    """Evaluate a language model at other windows than its training's; -> what lengths.json says

    Error: a window that its positions, filters or data are too short for
    """
    if not data.window:
        raise Error(f"--eval-lengths is for language models, and {data.name} has samples.")
    if 0 < cfg.positions < max(lengths):
        raise Error(
            f"--eval-lengths {max(lengths)}: the network has {cfg.positions} learned positions, "
            "and none beyond."
        )
    network.stretch(params, cfg, max(lengths))  # or its Error, before anything is computed
    of_length = {length: data_sets.windowed(data, length) for length in lengths}
    single = recipe.eval_protocol == "last"  # one target in a window of any length
    print("   length    loss  perplexity  accuracy")
    rows = []
    for length, windows in of_length.items():
        times = data.window / length  # as many tokens in a batch, and in all
        own = replace(
            recipe,
            batch_size=max(1, int(recipe.batch_size * times)),
            eval_samples=math.ceil(recipe.eval_samples * (1 if single else times)),
        )
        stretched, longer = network.stretch(params, cfg, length)
        loss, accuracy = evaluate(stretched, longer, data.test, windows, own)
        rows.append({"length": length, "loss": loss, "accuracy": accuracy})
        rows[-1] |= text_scores(loss, data)
        print(f"{length:9,} {loss:7.4f} {four_digits(rows[-1]['perplexity']):>11} {accuracy:9.4f}")
    result = {"protocol": recipe.eval_protocol, "trained": data.window, "step": state["step"]}
    result["lengths"] = rows
    write_json(out / "lengths.json", result)
    return result


def text_scores(loss, data):
    """What a language model's loss is by other names; nothing for other data"""
    if not data.window:
        return {}
    scores = {"perplexity": math.exp(min(loss, 700.0))}
    return scores | ({"bits_per_character": loss / math.log(2)} if data.unit == "character" else {})


def said(loss, data):
    """The same in words"""
    scores = text_scores(loss, data)
    words = [f"perplexity {four_digits(scores['perplexity'])}"] if "perplexity" in scores else []
    if "bits_per_character" in scores:
        words.append(f"{scores['bits_per_character']:.4f} bits per character")
    return "".join(", " + word for word in words)


def four_digits(x):
    """A number as 12.34 or 123.4, from 1,000 on as 12,345"""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def report(test, data, recipe, state):
    """Print the scores on the test split beside the trivial baselines; -> what result.json says"""
    loss, accuracy = test
    step, seconds = state["step"], state["seconds"]
    planned = state["total"] if math.isfinite(state["total"]) else step
    print(
        f"test accuracy {accuracy:.4f}, loss {loss:.4f}{said(loss, data)}, "
        f"after {step} of {planned} steps in {seconds / 60:.1f} minutes"
    )
    count, there = evaluated(data.test, data, recipe)
    if data.window:
        print(f"    by the protocol {recipe.eval_protocol}, windows of {data.window:,}")
    if count < there:
        what = "windows" if data.window else "test samples"
        print(f"    on {count:,} of the {there:,} {what} (--eval-samples)")
    for name, value in data.baselines.items():
        print(f"    {name}: {value:.4f}")
    for name, value in data.loss_baselines.items():
        print(f"    {name}, loss: {value:.4f}{said(value, data)}")
    result = {"test_accuracy": accuracy, "test_loss": loss, "baselines": data.baselines}
    if state["best"]:
        print(f"    the network of step {state['best']['step']}, the best on the validation split")
        result |= {"selected_step": state["best"]["step"], "valid_loss": state["best"]["loss"]}
    result |= {"step": step, "steps": planned, "seconds": round(seconds, 1), "test_samples": count}
    if data.loss_baselines:
        result["loss_baselines"] = data.loss_baselines
    if data.window:
        result |= {f"test_{name}": value for name, value in text_scores(loss, data).items()}
        result |= {"protocol": recipe.eval_protocol, "window": data.window}
    return result


def describe(settings, params, cfg, recipe, data, total, xp, teacher):
    """Print what will run"""
    count = sum(p.size for p in params.values())
    decoded = data_sets.targets_of_batch(data, recipe.batch_size) if data.per_position else 0
    size = recipe.batch_size, data.max_length, decoded
    megabytes = runs.memory_estimate(params, cfg, *size) / 2**20
    sizes = ", ".join(f"{len(getattr(data, s)):,} {s}" for s in ("train", "valid", "test"))
    if data.window:
        sizes += f" {data.unit}s in windows of {data.window:,}"
    length = f"{total:,}" if math.isfinite(total) else f"in {settings['minutes']:g} minutes as many"
    print(f"{settings['model']} on {data.name} ({sizes}; {data.source})")
    print(
        f"{count:,} parameters, {settings['dtype']}, about {megabytes:,.1f} MiB a step, "
        f"{backend.device_name(xp)}, seed {settings['seed']}"
    )
    print(
        f"{backend.threads()} threads, BLAS core type {backend.blas_core()}, "
        f"{length} steps of {recipe.batch_size}"
    )
    if str(teacher):
        print(f"teacher {teacher}")
    kind = " (accuracy)" if data.loss_baselines else ""
    beat = [f"{name} {value:.4f}{kind}" for name, value in data.baselines.items()]
    losses = data.loss_baselines.items()
    beat += [f"{name} {value:.4f} (loss{said(value, data)})" for name, value in losses]
    print("to beat: " + ", ".join(beat))


def write_json(path, value):
    """Indented, atomically"""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


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

BEST = "best.safetensors"  # the parameters that --select best keeps
SLOW = 1e-5  # learning rate of Hyena's positions, as published
FITTED = ("context", "depth")  # fields of a layer that follow from data set and recipe
EVALUATION = ("eval_protocol", "eval_samples")  # ... and of an evaluation alone
CHANGEABLE = ("device", "threads", "minutes", "data_dir")  # when a run is resumed


def main(arguments=None):
    """-> exit code: 0, 2 for wrong usage, 1 for everything else that failed"""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    backend.keep_freed_memory()
    return run_command(command(named(arguments, "--model")), arguments, "train.py")


def command(model):
    """The command with the options of `model`, or of all models when it is not a known one"""
    models = [model] if model in network.NAMES else network.MODELS
    choice, option, positive = click.Choice, click.Option, click.FloatRange(0, min_open=True)
    preset = "small: ours, two cores and about ten minutes; paper: the published recipe. [small]"
    device = "auto: a GPU where one works. [auto]"
    minutes = "Train at most so long; without --steps or --epochs the schedule is made to end then."
    cut = "Cut texts to so many tokens; of a language model the window. [the data set's own length]"
    lengths = (
        "With --resume, of a language model: only evaluate, at windows of these lengths, such as "
        "256,512,1024; prints a table and writes it to lengths.json."
    )
    resume = (
        f"Go on with the run in this folder; only {_names(CHANGEABLE)} can change; with "
        f"--eval-only {_names(EVALUATION)}, too."
    )
    options = [
        option(["--model"], type=choice(network.NAMES), help="The model."),
        option(["--data"], type=choice(data_sets.NAMES), help="The data set."),
        option(["--preset"], type=choice(presets.PRESETS), help=preset),
        option(["--device"], type=choice(["auto", "cpu", "cuda"]), help=device),
        option(["--dtype"], type=choice(["float32", "float64"]), help="[float32]"),
        option(["--seed"], type=int, help="Of weights, batches and dropout. [0]"),
        option(["--data-seed"], type=int, help="Of generated data sets. [0]"),
        option(["--threads"], metavar="INTEGER", type=click.IntRange(1), help="[all cores]"),
        option(["--minutes"], metavar="FLOAT", type=positive, help=minutes),
        option(
            ["--data-dir"],
            metavar="FOLDER",
            help="Folder of the data. [$REF_DATA_DIR or the user's cache]",
        ),
        option(["--max-length"], metavar="INTEGER", type=click.IntRange(2), help=cut),
        option(["--download"], is_flag=True, help="Fetch data files that are missing."),
        option(["--out"], metavar="FOLDER", help="Folder of the run. [runs/MODEL-DATA-SEED]"),
        option(["--resume"], metavar="RUN", help=resume),
        option(
            ["--eval-only"], is_flag=True, help="With --resume: only evaluate on the test split."
        ),
        option(["--eval-lengths"], metavar="INTEGERS", help=lengths),
        option(
            ["--corrected"],
            is_flag=True,
            default=None,
            help="--teacher released without the mistakes of the published code.",
        ),
        option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version),
    ]
    layers = [network.model_module(name).Config for name in models]
    return click.Command(
        "train",
        params=options
        + options_of(
            presets.Recipe, teaching.Config, *layers, without=FITTED, texts=teaching.TEXTS
        ),
        callback=_train,
        context_settings={"max_content_width": 100},
        help="""Train a model on a data set.

        Any hyper-parameter of the model's layer or of the recipe is an option; the preset gives the
        rest, and what it does not name is as in brackets below.

        Example: python train.py --model hope --data lra-listops --d-model 32 --steps 500
        """,
    )


def _version(context, option, value):
    if value:
        print(__version__)
        context.exit()


def _names(options):
    return ", ".join("--" + name.replace("_", "-") for name in options)


def _train(resume, eval_only, eval_lengths, out, download, **options):
    options = {name: value for name, value in options.items() if value is not None}
    if "data_dir" in options:
        options["data_dir"] = os.path.abspath(os.path.expanduser(options["data_dir"]))
    lengths = _lengths(eval_lengths)
    if resume:
        options |= {"out": out} if out else {}
        _resume(Path(resume), options, eval_only or bool(lengths), download, lengths)
        return
    if eval_only or lengths:
        given = "--eval-only" if eval_only else "--eval-lengths"
        raise click.UsageError(f"{given} needs --resume RUN: it evaluates a trained network.")
    for name in ("model", "data"):
        if name not in options:
            raise click.UsageError(
                f"--{name} is missing. Example: python train.py --model hope --data lra-listops"
            )
    if options.get("replay"):
        options["replay"] = os.path.abspath(os.path.expanduser(options["replay"]))
    corrected = options.pop("corrected", False)
    settings = _usable(functools.partial(presets.make_settings, corrected=corrected), options)
    if corrected and settings["teaching"].get("teacher") != "released":
        raise click.UsageError("--corrected is for --teacher released.")
    _check_rates(options, settings)
    out = Path(out or f"runs/{settings['model']}-{settings['data']}-{settings['seed']}")
    for name in ("config.json", "checkpoint.safetensors", "metrics.jsonl", "result.json"):
        if os.path.lexists(out / name):
            raise Error(
                f"{out} holds a run already. Go on with it by --resume, or choose another --out."
            )
    run(settings, out, _command(out), download=download)


def _check_rates(options, settings):
    """UsageError for a rate of parameters that the model does not have, or a setting of a teacher
    that it does not have: it would do nothing"""
    if names := teaching.unused(options, settings["teaching"]):
        teacher = settings["teaching"].get("teacher", "none")
        raise click.UsageError(
            f"{_names(names)} does nothing with --teacher {teacher} as it is set here."
        )
    module = network.model_module(settings["model"])
    there = set(module.groups(module.Config(**settings["layer"])).values())
    for name, group in (("ssm_lr", "ssm"), ("ssm_weight_decay", "ssm"), ("dt_lr", "dt")):
        if name in options and group not in there:
            raise click.UsageError(
                f"{_names([name])} is for parameters that {settings['model']} does not have here."
            )


def _lengths(text):
    """The numbers in 256,512,1024; none for None.   UsageError: it is not of this form"""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and 0 < int(part) < 2**53 for part in parts):
        raise click.UsageError(f"--eval-lengths {text}: expected numbers such as 256,512,1024.")
    return list(map(int, parts))


def _resume(out, options, eval_only, download, lengths=()):
    evaluation = [name for name in EVALUATION if eval_only and name in options]
    protocol = {name: options.pop(name) for name in evaluation}
    if fixed := options.keys() - CHANGEABLE:
        raise click.UsageError(
            "--resume takes its settings from the run; it cannot be combined with "
            f"{_names(sorted(fixed))}."
        )
    if not os.path.lexists(out / "config.json"):
        raise Error(f"{out} holds no run: there is no config.json in it.")
    settings = presets.read_settings(out / "config.json")
    settings = _usable(presets.changed, settings, options)
    recipe = _usable(lambda given: presets.Recipe(**settings["recipe"] | given), protocol)
    settings |= {"recipe": asdict(recipe)}
    run(settings, out, _command(out, options), True, eval_only, download, lengths)


def _usable(make, *values):
    """Settings from options, with the threads set; a value that is not one is wrong usage"""
    try:
        settings = make(*values)
        if values[-1].get("threads"):
            backend.set_threads(settings["threads"])
    except Error as e:
        raise click.UsageError(str(e)) from e
    return settings


def _command(out, options=()):
    """The command that goes on with a run"""
    changed = "".join(f" {_names([name])} {shlex.quote(str(options[name]))}" for name in options)
    return f"python train.py --resume {shlex.quote(str(out))}{changed}"


if __name__ == "__main__":
    sys.exit(main())
