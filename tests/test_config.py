"""The configuration, its flags, and what a message shows of foreign text."""

import argparse
import io
import math
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import run_here

from training.config import Config, RunError, errors_in_one_line, flag, one_line, parse_command_line, printable


def parse(*flags):
    return run_here(lambda: print(parse_command_line("baseline")), *flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("momentum", -0.1), ("ema_horizon", math.nan), ("seed", 2**32), ("precision", "fp8")],
)
def test_a_configuration_beyond_its_limits_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{flag(name)} must be .*, got {value}"):
        Config(**{name: value})


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--epochs", v) for v in ("0", "-1", "1.5", "nan", "inf", "", "ten")]
    + [("--learning-rate", v) for v in ("-1", "nan", "inf", "")]
    + [("--batch-size", "1"), ("--ema-horizon", "1"), ("--seed", "-1"), ("--data-dir", ""), ("--device", "tpu")],
)
def test_a_bad_value_is_told_with_its_flag_and_status_2(flag, value):
    result = parse(flag, value)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert flag in last
    assert repr(value) in last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--synthetic", "--data-dir", "pictures"), "--synthetic draws its own images: leave out --data-dir"),
        (("--synthetic", "--data-url", "http://localhost"), "--synthetic draws its own images"),
        (("--crop-padding", "32"), "--crop-padding must be less than --image-size 32, got 32"),
        (("--epoch", "3"), "unrecognized arguments: --epoch"),  # no abbreviations
        (("--recipe", "long"), "unrecognized arguments: --recipe"),
    ],
)
def test_flags_that_contradict_each_other_or_do_not_exist_are_refused(flags, message):
    result = parse(*flags)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_flags_set_the_fields_of_their_names():
    text = parse("--epochs", 3, "--data-dir", "a b", "--fresh", "--init-from", "x.pt", "--precision", "bf16").stdout
    paths = dict(data_dir=Path("a b"), init_from=Path("x.pt"), output_dir=Path("runs/baseline"))
    assert text == f"{Config(epochs=3, fresh=True, precision='bf16', **paths)}\n"


@pytest.mark.parametrize(("epochs", "share"), [(1, 1 / 90), (9, 0.1), (45, 0.5), (100, 0.5)])
def test_cutmix_grows_with_the_length_unless_it_is_given(epochs, share):
    assert Config(epochs=epochs).cutmix == share
    assert Config(epochs=epochs, cutmix=0.0).cutmix == 0
    assert f"cutmix={share}," in parse("--epochs", epochs).stdout
    assert "cutmix=0.25," in parse("--epochs", epochs, "--cutmix", 0.25).stdout


def test_what_decides_the_weights_is_the_identity_and_no_path_device_or_action():
    local = {"data_dir", "data_url", "output_dir", "device", "threads", "synthetic", "fresh", "init_from", "summary"}
    assert Config().recipe().keys() == {item.name for item in fields(Config)} - local
    assert Config(threads=2, fresh=True, device="cpu").recipe() == Config().recipe() != Config(seed=1).recipe()


def test_an_error_becomes_one_line_of_bounded_length():
    assert one_line(ValueError("a\n  b\t c")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10**6))) == 300


def test_line_breaks_terminal_codes_and_undecodable_bytes_are_escaped():
    assert printable("a\nb\x1b[31m\u202e\udcff") == r"a\nb\x1b[31m\u202e\udcff"
    assert printable("caf\u00e9 \u4e2d 7%") == "caf\u00e9 \u4e2d 7%"
    printable(Path("\udcff")).encode()


def test_an_expected_failure_is_printed_without_terminal_codes_and_any_other_keeps_its_traceback():
    def fail(error):
        with errors_in_one_line():
            raise error

    result = run_here(lambda: fail(RunError("no folder a\x1b[2Jb\nline two")))
    assert (result.returncode, result.stderr) == (1, "error: no folder a\\x1b[2Jb\nline two\n")
    for error in (KeyError("a bug"), OSError("a bug"), RuntimeError("a bug"), argparse.ArgumentTypeError("a bug")):
        with pytest.raises(type(error)):
            run_here(lambda error=error: fail(error))


def test_a_stream_of_a_notebook_is_used_as_it_is(monkeypatch):
    class Stream(io.TextIOBase):
        def write(self, text):
            raise RunError(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    with pytest.raises(SystemExit, match="error: written"), errors_in_one_line():
        print("written")
