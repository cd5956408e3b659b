"""What the README claims is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_lines_of_each_model():
    rows = re.findall(r"\((ref/\w+\.py)\) \| (\d+) \|", README)
    assert rows
    for file, lines in rows:
        assert len((ROOT / file).read_text().splitlines()) == int(lines), file


def test_every_model_is_in_the_table():
    from ref import network

    for name in network.MODELS:
        assert f"(ref/{name}.py) |" in README


def test_the_example_prints_what_it_says():
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.S).groups()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == output, run.stderr


def test_every_file_it_names_is_there():
    for path in re.findall(r"\]\(((?:ref|data|train)[^)]*)\)", README):
        assert (ROOT / path).exists(), path


def test_every_command_it_names_exists():
    from click import Context

    import train
    from ref.__main__ import main

    context = Context(main)
    for command in re.findall(r"python -m ref (\w+)", README):
        assert command in main.list_commands(context)
    options = {o for p in train.command("hope").params for o in p.opts}
    for option in re.findall(r"train\.py .*?(--[\w-]+)", README):
        assert option in options or option == "--help"


def test_the_functions_that_it_checks_are_judged_as_it_says(tmp_path, monkeypatch, capsys):
    """All but the digits of the errors, which differ between processors"""
    pytest.importorskip("torch", reason="torch is not installed (the extra `peers`)")
    from ref.__main__ import main
    from ref.options import run_command

    code = re.search(r"my_scan\.py:\n\n```python\n(.*?)```", README, re.S)[1]
    (tmp_path / "my_scan.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    shown = re.findall(
        r"```\npython -m ref (verify --callable .*?)\n```\n\n```\n(.*?)```", README, re.S
    )
    assert len(shown) == 2
    for command, expected in shown:
        monkeypatch.setattr(sys, "argv", ["ref", *command.split()])
        run_command(main, command.split(), "python -m ref")
        output, err = capsys.readouterr()
        assert not err
        lines = [masked(line) for line in expected.splitlines() if line.strip() != "..."]
        assert lines == [masked(line) for line in output.splitlines()][: len(lines)]
        assert "..." in expected or len(lines) == len(output.splitlines())


def masked(line):
    """Without numbers that rounding decides, and without places"""
    return re.sub(r"-?\d+\.\d+(e[-+]\d+)?|\[[\d, ]+\]|expected -?\d+", "#", line)
