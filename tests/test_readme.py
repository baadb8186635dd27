"""The README as a newcomer reads it: in a copy of the project, every command and every piece of Python, in its order.

Data and epochs are small ones; what installs, is for several processes, or tests is parsed.
"""

import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
import torch.distributed.run
from helpers import REPOSITORY, random_images, write_folders
from PIL import Image

from training.config import Config, parse_command_line

README = (REPOSITORY / "README.md").read_text()
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SMALL = ["--image-size", "16", "--threads", "1", "--compile", "off"]
RUNNER = """
import functools, json, runpy, sys
sys.path.insert(0, "")
import training.data
training.data.draw_shapes = functools.partial(training.data.draw_shapes, train=100, test=50)
for step in json.load(sys.stdin):
    print("$", step, flush=True)
    try:
        if isinstance(step, str):
            exec(step, {})
        elif step[1] == "-m":
            sys.argv = step[2:]
            runpy.run_module(step[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = step[1:]
            runpy.run_path(step[1], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(end.code)
"""


def parts():
    """Return what the README's blocks hold, in order: commands as lists of words, pieces of Python as strings."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S):
        commands = [command for line in text.splitlines() for command in line.split(" && ")]
        found += [text] if language == "python" else [shlex.split(command, comments=True) for command in commands]
    return found


PARTS = parts()
COMMANDS = [part for part in PARTS if isinstance(part, list)]


def shortened(command):
    """Return a command that trains with fewer epochs: 1 if the README gives a number, or else 2."""
    if command[1] == "-m" or {"--summary", "--help"} & set(command):
        return command
    return [*command, *SMALL, "--epochs", "1" if "--epochs" in command else "2"]


def test_the_readme_runs_from_its_first_line_to_its_last(tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns("data", "runs", ".*", "__pycache__"))
    write_folders(copy / "data", train=40, test=20, classes=CIFAR10_CLASSES)
    write_folders(copy / "pictures")
    Image.fromarray(random_images(1, 0)[0]).save(copy / "cat.jpg")
    runnable = [part for part in PARTS if isinstance(part, str) or part[0] == "python"]
    steps = [part if isinstance(part, str) else shortened(part) for part in runnable]
    result = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(steps), cwd=copy, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert result.stdout.count("\n$ ") + 1 == len(steps) > 14
    for name in ("checkpoint.pt", "summary.json", "curves.png", "confusion.png", "mistakes.png", "samples.png"):
        assert (copy / "runs" / "baseline" / name).exists()


def test_what_the_readme_installs_is_what_the_requirements_name():
    known = "".join((REPOSITORY / name).read_text() for name in ("requirements.txt", "tests/requirements.txt"))
    for command in COMMANDS:
        if command[0] == "pip":
            assert command[1] == "install"
            for word, before in zip(command[2:], command[1:], strict=False):
                if before == "-r":
                    assert (REPOSITORY / word).exists()
                elif word != "-r":
                    assert re.search(rf"^{word}\b", known, re.M), word
    others = {command[0] for command in COMMANDS} - {"pip", "python", "torchrun"}
    assert others == {"pytest"}


def test_what_the_readme_says_of_several_processes_is_parsed(monkeypatch):
    found = [command for command in COMMANDS if command[0] == "torchrun"]
    assert found
    for command in found:
        options = torch.distributed.run.get_args_parser().parse_args(command[1:])
        assert (REPOSITORY / options.training_script).exists()
        monkeypatch.setattr(sys, "argv", [options.training_script, *options.training_script_args])
        assert parse_command_line("baseline").epochs == Config.epochs


def anchors(document):
    """Return the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [REPOSITORY / "README.md", *sorted((REPOSITORY / "results").rglob("README.md"))])
def test_every_link_leads_to_something(document):
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", document.read_text())
    assert document.parent != REPOSITORY or links
    for path, anchor in links:
        target = document.parent / path if path else document
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), anchor


@pytest.mark.parametrize("variant", ["baseline", "enhanced"])
def test_the_table_says_what_the_runs_say_whose_curves_are_shown(variant):
    folder = (REPOSITORY / re.search(r"!\[.*\]\((.*)\)", README)[1]).parent
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{variant}-*/summary.json"))]
    (row,) = re.findall(rf"^\| {variant} \|.*$", README, re.M)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    first = runs[0]  # seed 0, whose time is given
    assert cells.pop(3).startswith(f"{first['seconds'] / 60:.1f} min")
    accuracies = []
    for weights in ("averaged", "averaged_tta"):
        values = [run["test_accuracy"][weights] for run in runs]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        accuracies.append(f"{statistics.mean(values):.2f}{deviation}%")
    assert cells == [variant, *accuracies, f"{first['parameters']:,}", f"{first['macs'] / 1e6:.1f} M"]
