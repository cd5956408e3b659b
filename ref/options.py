"""What train.py and `python -m ref` share: options from the fields of dataclasses, exit codes."""

import contextlib
import dataclasses
import sys

import click


def all_named(arguments, option):
    """The values of `option` in arguments not parsed yet: the model decides which options exist"""
    values = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith(option + "="):
            values.append(argument.partition("=")[2])
        if argument == option:
            values.append(following)
    return values


def named(arguments, option):
    """The last of them, which is the one that holds, or None"""
    return next(reversed(all_named(arguments, option)), None)


def described(default, text, choices=()):
    """A dataclass's field with the text of its option, and the values that it may have"""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


def options_of(*configs, without=(), texts=None):
    """One click option for each field of the dataclasses (--d-model, --prenorm/--no-prenorm)

    It is absent unless given; a field that two of them have is one option. texts: name -> what it
    is, where the field does not say it.
    """
    fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
    fields = {name: field for name, field in fields.items() if name not in without}
    texts, simple = texts or {}, (bool, int, float, str)
    own = {name: field for name, field in fields.items() if field.type in simple}
    return [_option(field, texts.get(name, "")) for name, field in own.items()]


def _option(field, text):
    name = field.name.replace("_", "-")
    default = "" if field.default is dataclasses.MISSING else f"[{field.default}]"
    if field.type is bool:
        default = f"[{name if field.default else 'no-' + name}]"
        text = f"{field.metadata.get('help', text)} {default}".strip()
        return click.Option([f"--{name}/--no-{name}", field.name], default=None, help=text)
    text = f"{field.metadata.get('help', text)} {default}".strip()
    choices = field.metadata.get("choices")
    kind = click.Choice(choices) if choices else field.type
    return click.Option([f"--{name}", field.name], type=kind, default=None, help=text)


def run_command(command, arguments, name):
    """Run a click command: 0, or with a sentence on stderr 2 for wrong usage, 1 for the rest"""
    from ref import Error

    with contextlib.suppress(AttributeError):  # a line is seen when it is written, also on a pipe
        sys.stdout.reconfigure(line_buffering=True, errors="surrogateescape")
    try:
        status = command.main(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        return 2
    except click.ClickException as e:
        e.ctx = None  # the sentence alone, without the usage lines
        e.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        return _failed("Interrupted.")
    except MemoryError:
        return _failed("Error: out of memory; use a smaller batch, length or width.")
    except Error as e:
        return _failed(f"Error: {e}")
    except OSError as e:
        return _failed(f"Error: {e.filename or 'the output'}: {e.strerror or e}.")
    return status if isinstance(status, int) else 0


def _failed(sentence):
    print(sentence, file=sys.stderr)
    return 1
