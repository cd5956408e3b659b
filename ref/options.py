"""Command-line options from the fields of configuration dataclasses, shared by train.py and `python -m ref`."""

import dataclasses

import click


def named(arguments, option):
    """The value that `option` has among arguments not parsed yet: which options exist depends on the model"""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith(option + "="):
            return argument.partition("=")[2]
        if argument == option:
            return following
    return None


def options_of(*configs):
    """One click option for each field of the dataclasses (--d-model, --bidirectional/--no-bidirectional), absent
    unless given; a field that two of them have is one option"""
    fields = {field.name: field for config in configs for field in dataclasses.fields(config)}
    return [_option(field) for field in fields.values() if field.type in (bool, int, float, str)]


def _option(field):
    name = field.name.replace("_", "-")
    default = "" if field.default is dataclasses.MISSING else f"{field.default} by default."
    if field.type is bool:
        return click.Option([f"--{name}/--no-{name}", field.name], default=None, help=default)
    return click.Option([f"--{name}", field.name], type=field.type, default=None, help=default)


def run_command(command, arguments, name):
    """Run a click command: 0, or 2 for wrong usage, 1 for everything else that failed, with sentences on stderr"""
    import sys

    from ref import Error

    try:
        status = command.main(arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as e:
        e.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return 1
    except MemoryError:
        print("Error: out of memory; use a smaller batch, length or width.", file=sys.stderr)
        return 1
    except Error as e:
        print(f"Error: {e}", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0
