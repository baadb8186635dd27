"""Whatever happens to the machine, no run is lost and no number wrong: real scripts, real signals, real limits."""

import contextlib
import csv
import ctypes
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import flags, run_script, run_script_here, start, wait_for, write_folders
from test_training import small_data, train
from torch import nn

import common
from common import Config, RunError

EPOCHS = 6
BOTH = pytest.mark.parametrize("variant", ["baseline", "enhanced"])
DEFAULTS = ("--compile", "on", "--precision", "bf16", "--threads", 2)  # what a long run uses where it can


def results_of(run: Path) -> tuple[bytes, list[list[str]]]:
    """Return what has to be equal in equal runs: the checkpoint and all but the times of metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return (run / "checkpoint.pt").read_bytes(), [row[:5] for row in csv.reader(file)]


def epoch_of(run: Path) -> int:
    return common.load_checkpoint(run / "checkpoint.pt")["epoch"] if (run / "checkpoint.pt").exists() else 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="module")
def pictures(place):
    return write_folders(place / "pictures with spaces \u00e9")


@pytest.fixture(scope="module")
def undisturbed(place, pictures):
    """Return what makes a run that nothing disturbs, once for each variant and set of flags, and tells its seconds."""
    seconds = {}

    def make(variant: str, *more: object) -> tuple[Path, float]:
        output = place / "-".join(["undisturbed", variant, *map(str, more)])
        if output not in seconds:
            begun = time.monotonic()
            result = run_script(variant, *flags(pictures, output, EPOCHS), *more)
            assert result.returncode == 0, result.stderr
            seconds[output] = time.monotonic() - begun
        return output, seconds[output]

    return make


@pytest.fixture(scope="module")
def killed(place, pictures):
    """Return a run of the baseline that was killed after its first checkpoint; only copies of it may be continued."""
    output = place / "killed"
    process = start("baseline", *flags(pictures, output, EPOCHS))
    wait_for(output / "checkpoint.pt", process)
    process.kill()
    process.communicate()
    assert 0 < epoch_of(output) < EPOCHS
    return output


@pytest.fixture
def half_done(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "half done \u00e9")


# ---- Kills ---------------------------------------------------------------------------------------------------------


def check_kills(variant: str, count: int, tmp_path: Path, pictures: Path, undisturbed, *more: object) -> None:
    """Kill runs at `count` random moments; what is continued must not go back, and must end as if nothing had been."""
    (reference, seconds), seed = undisturbed(variant, *more), random.randrange(10**6)
    moments, kills, finished = random.Random(seed), 0, 0
    print(f"moments drawn with seed {seed}")  # shown when the test fails
    while kills < count or not finished:
        output, before = tmp_path / f"run {finished}", epoch_of(tmp_path / f"run {finished}")
        process = start(variant, *flags(pictures, output, EPOCHS), *more, stdout=None, stderr=None)
        with contextlib.suppress(Exception):
            process.wait(moments.uniform(0, seconds) if kills < count else 240)
        kills += process.poll() is None
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
        assert epoch_of(output) >= before
        if code == 0:
            assert results_of(output) == results_of(reference)
            finished += 1
    assert kills == count


@BOTH
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_been(variant, tmp_path, pictures, undisturbed):
    check_kills(variant, 3, tmp_path, pictures, undisturbed)


@pytest.mark.slow
@BOTH
def test_a_run_killed_at_twenty_random_moments_ends_as_if_nothing_had_been(variant, tmp_path, pictures, undisturbed):
    check_kills(variant, 20, tmp_path, pictures, undisturbed)


@pytest.mark.slow
@BOTH
def test_so_does_one_that_is_compiled_and_in_bfloat16(variant, tmp_path, pictures, undisturbed):
    check_kills(variant, 20, tmp_path, pictures, undisturbed, *DEFAULTS)


DIE_IN_THE_SAVE = """
import os, signal, sys
def line(frame, event, _, count=[0]):
    count[0] += event == "line"
    if count[0] == {death}:
        os.kill(os.getpid(), signal.SIGKILL)
    return line
def call(frame, *_):
    names = ("save_checkpoint", "replacing")
    if frame.f_code.co_name in names and frame.f_code.co_filename.endswith("common.py"):
        return line
sys.settrace(call)
"""


def in_a_child(patch: str, function) -> int:
    """Run `patch` and then `function` in a forked process and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            exec(patch, {})
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_death_before_any_line_of_the_save_leaves_the_old_file_or_the_new_one(tmp_path):
    config = Config(epochs=3, batch_size=5, precision="fp32")
    about = {"variant": "tiny", "network": {}, "recipe": config.decisive(), "data": "made up"}
    path, whole = tmp_path / "checkpoint.pt", []
    for epochs in (1, 2):
        state, _ = train(config, epochs=epochs)
        common.save_checkpoint(path, state, epochs, about)
        whole.append(path.read_bytes())
    outcomes, death, status = [], 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        path.write_bytes(whole[0])
        death += 1
        status = in_a_child(DIE_IN_THE_SAVE.format(death=death), lambda: common.save_checkpoint(path, state, 2, about))
        outcomes.append(whole.index(path.read_bytes()))
        common.load_checkpoint(path)
        common.save_checkpoint(tmp_path / "checkpoint.pt", state, 2, about)  # over whatever was left
        assert os.listdir(tmp_path) == ["checkpoint.pt"]
    assert status == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(0) > 8 and outcomes.count(1) > 3


def test_a_death_in_the_middle_of_the_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def write() -> None:
        with common.replacing(path) as file:
            file.write(b"n")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child("", write) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert path.with_name("checkpoint.pt.tmp").read_bytes() == b"n"


@pytest.mark.slow
def test_a_script_that_dies_before_any_line_of_a_save_ends_as_if_nothing_had_been(
    tmp_path, pictures, undisturbed, half_done
):
    reference, _ = undisturbed("baseline")
    patch = DIE_IN_THE_SAVE.replace(
        "names = (", 'names = ("train", '
    )  # with the lines around the two saves of an epoch
    for death in range(1, 60, 3):
        output = shutil.copytree(half_done, tmp_path / str(death))
        process = run_script("baseline", *flags(pictures, output, EPOCHS), patch=patch.format(death=death))
        assert process.returncode == -signal.SIGKILL
        assert run_script("baseline", *flags(pictures, output, EPOCHS)).returncode == 0
        assert results_of(output) == results_of(reference)
        shutil.rmtree(output)


# ---- Signals -------------------------------------------------------------------------------------------------------

SLOW_SAVE = """
import os, pathlib, time
fsync, os.fsync = os.fsync, lambda file: (pathlib.Path({mark!r}).touch(), time.sleep(2), fsync(file))
"""


@pytest.mark.parametrize("signals", [1, 2])
@pytest.mark.parametrize("where", ["training", "save"])
def test_ctrl_c_ends_in_one_line_with_status_130_and_leaves_nothing_over(signals, where, half_done, pictures, tmp_path):
    mark = tmp_path / "saving"
    patch = SLOW_SAVE.format(mark=str(mark)) if where == "save" else ""
    epoch, rows = epoch_of(half_done), half_done / "metrics.csv"
    rows.unlink()  # written anew by the first epoch
    process = start("baseline", *flags(pictures, half_done, EPOCHS), patch=patch)
    wait_for(mark if where == "save" else rows, process)
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("interrupted")
    assert errors.count("\n") == 1
    assert {file.name for file in half_done.iterdir()} - {"metrics.csv"} == {"checkpoint.pt", ".lock"}
    assert epoch_of(half_done) in range(epoch, EPOCHS)


def test_code_that_swallows_exceptions_does_not_make_a_run_deaf_to_ctrl_c(tmp_path):
    def swallow() -> None:
        with common.failures_in_one_line(Config(output_dir=tmp_path)), contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        os._exit(7)

    assert in_a_child("", swallow) == 130


def test_ctrl_c_while_evaluating_leaves_alone_what_another_process_is_writing(tmp_path):
    (tmp_path / "checkpoint.pt.tmp").write_text("half")

    def evaluate() -> None:
        with common.failures_in_one_line(Config(output_dir=tmp_path, evaluate=tmp_path / "checkpoint.pt")):
            signal.raise_signal(signal.SIGINT)

    assert in_a_child("", evaluate) == 130
    assert (tmp_path / "checkpoint.pt.tmp").read_text() == "half"


def test_a_fresh_run_that_torchrun_restarts_continues_what_it_began(half_done, pictures, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS), "--fresh")
    assert result.returncode == 0, result.stderr
    assert "continuing after epoch" in result.stdout


def test_a_run_in_the_background_stays_deaf_to_ctrl_c(half_done, pictures):
    process = start(
        "baseline",
        *flags(pictures, half_done, EPOCHS),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell does after `&`
    )
    for _ in range(10):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) and process.returncode == 0


def test_sigterm_ends_a_run_at_once_and_the_same_command_continues_it(tmp_path, pictures, undisturbed):
    output = tmp_path / "run"
    process = start("baseline", *flags(pictures, output, EPOCHS))
    wait_for(output / "checkpoint.pt", process)
    process.terminate()
    process.wait(timeout=2)
    assert process.returncode == -signal.SIGTERM
    result = run_script("baseline", *flags(pictures, output, EPOCHS))
    assert "continuing after epoch" in result.stdout
    assert results_of(output) == results_of(undisturbed("baseline")[0])


# ---- Disks and places ----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_with_path_and_cause_and_leaves_the_checkpoint_whole(half_done, pictures):
    before = (half_done / "checkpoint.pt").read_bytes()
    limit = len(before) // 2
    result = run_script(
        "baseline",
        *flags(pictures, half_done, EPOCHS),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    assert result.stderr == f"error: {half_done / 'checkpoint.pt'} cannot be written: File too large\n"
    assert (half_done / "checkpoint.pt").read_bytes() == before
    assert not list(half_done.glob("*.tmp"))


def drop_capabilities() -> None:
    """Make root obey the permissions of files, as other users do."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("where", ["it", "parent"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(where, tmp_path):
    output = tmp_path / "read-only" / "run"
    (output if where == "it" else output.parent).mkdir(parents=True)
    (output if where == "it" else output.parent).chmod(0o555)
    result = run_script("baseline", "--synthetic", "--output-dir", output, preexec_fn=drop_capabilities)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: --output-dir {output}: Permission denied\n"


def test_missing_parents_of_the_place_are_made(tmp_path):
    with common.writing_alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_two_runs_at_once_in_one_place_and_the_second_is_refused(half_done, pictures, undisturbed):
    first = start("baseline", *flags(pictures, half_done, EPOCHS))
    while "continuing" not in first.stdout.readline():
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # or it might be done too early
    second = run_script("baseline", *flags(pictures, half_done, EPOCHS))
    first.send_signal(signal.SIGCONT)
    assert first.communicate() and first.returncode == 0
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr == f"error: --output-dir {half_done}: another run is writing there\n"
    assert results_of(half_done) == results_of(undisturbed("baseline")[0])


@pytest.mark.parametrize(
    "loss",
    [
        None,
        "epoch,seconds\n",
        "epoch,seconds\n1,x\n",
        b"\xff\xfe",
        "h\n" + "7,1.0\n" * 9,
        "h\n1,1,1,1,averaged,1,-1\n2,1,1,1,averaged,1,1\n",
    ],
)
def test_lost_rows_of_the_metrics_are_told_and_make_no_time_wrong(loss, tmp_path, capsys):
    table = tmp_path / "metrics.csv"
    if loss is not None:
        table.write_bytes(loss if isinstance(loss, bytes) else loss.encode())
    rows = common.read_rows(table, 2)
    assert f"{table} does not hold the 2 epochs done" in capsys.readouterr().out
    assert [row.split(",")[0] for row in rows] == ["1", "2"]
    assert all(math.isnan(float(row.split(",")[-1])) for row in rows)
    good = [f"{epoch},0.01,1.5,90.00,averaged,300.0,2.5" for epoch in (1, 2, 3)]
    table.write_text("\n".join(["epoch,...", *good]))
    assert common.read_rows(table, 2) == good[:2]


def test_a_run_with_lost_metrics_continues_and_reports_no_time(half_done, pictures, undisturbed):
    (half_done / "metrics.csv").unlink()
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS))
    assert result.returncode == 0, result.stderr
    assert "notice" in result.stdout
    assert json.loads((half_done / "summary.json").read_text())["seconds"] is None
    assert results_of(half_done)[0] == results_of(undisturbed("baseline")[0])[0]


# ---- Numbers that are not finite, memory, devices ------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [0, 2, 3])
def test_a_bad_loss_stops_the_run_before_its_epoch_is_saved(value, bad_step, tmp_path, monkeypatch):
    data, config = small_data(), Config(epochs=3, batch_size=5, precision="fp32", compile="off", output_dir=tmp_path)
    about, calls, cross_entropy = {"variant": "tiny"}, [], common.F.cross_entropy

    def bad_in_epoch_2(*arguments, **more):
        calls.append(None)
        loss = cross_entropy(*arguments, **more)
        return loss * value if len(calls) == 5 + bad_step else loss

    monkeypatch.setattr(common.F, "cross_entropy", bad_in_epoch_2)
    state, _ = train(config, epochs=0)
    with pytest.raises(RunError, match=rf"the loss became -?(nan|inf) in epoch 2, step {bad_step + 1}, at a learning"):
        common.train(state, data, config, about, 0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_a_bad_statistic_behind_good_losses_stops_the_run_before_its_epoch_is_saved(tmp_path, monkeypatch):
    data, config = small_data(), Config(epochs=3, batch_size=5, precision="fp32", compile="off", output_dir=tmp_path)
    state, _ = train(config, epochs=0)
    train_epoch = common.train_epoch

    def bad_in_epoch_2(state, loss_of, data, config, epoch, bar):
        result = train_epoch(state, loss_of, data, config, epoch, bar)
        state.raw.norm.running_var[0] = math.inf if epoch == 2 else 1.0
        return result

    monkeypatch.setattr(common, "train_epoch", bad_in_epoch_2)
    with pytest.raises(RunError, match=r"norm\.running_var of the raw weights is not finite after epoch 2"):
        common.train(state, data, config, {"variant": "tiny"}, 0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["epoch"] == 1


def test_a_rate_far_too_high_ends_in_one_line_and_nothing_is_saved(tmp_path, pictures):
    result = run_script("enhanced", *flags(pictures, tmp_path / "run"), "--learning-rate", "1e20")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "after epoch 1, with a learning rate of up to 1e+20" in result.stderr
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_batch_size(error):
    with pytest.raises(SystemExit) as ended, common.failures_in_one_line(Config(batch_size=77)):
        raise error
    assert ended.value.code == "error: out of memory; a --batch-size smaller than 77 needs less"


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a mistake"), common.failures_in_one_line(Config()):
        raise RuntimeError("a mistake")


def test_a_batch_too_large_for_the_memory_ends_in_one_line_and_changes_nothing(tmp_path):
    output = tmp_path / "run"
    result = run_script(
        "baseline",
        *("--synthetic", "--image-size", 64, "--batch-size", 1280, "--output-dir", output),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30)),
    )
    assert result.returncode == 1
    assert result.stderr == "error: out of memory; a --batch-size smaller than 1280 needs less\n"
    assert [file.name for file in output.iterdir()] == [".lock"]


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_told_with_those_that_are(device, tmp_path):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    result = run_script_here("baseline", "--synthetic", "--device", device, "--output-dir", tmp_path / "run")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: --device {device}: there is none here; this machine has ")
    assert result.stderr.endswith("cpu\n")


def test_a_run_continues_on_another_number_of_threads_and_says_what_holds_there(half_done, pictures):
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS), "--threads", 2)
    assert result.returncode == 0, result.stderr
    assert "bit for bit on the same machine, device, versions and thread count" in result.stdout
    assert epoch_of(half_done) == EPOCHS


# ---- Ways of starting ----------------------------------------------------------------------------------------------


def test_guards_and_weights_are_the_same_when_optimized_and_with_warnings_as_errors(half_done, pictures, undisturbed):
    strict = [word for name in ("common", "mobilenetv4_baseline", "__main__") for word in ("-W", f"error:::{name}")]
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS), python=("-O", *strict))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert results_of(half_done) == results_of(undisturbed("baseline")[0])
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS + 1), python=("-O", *strict))
    assert result.returncode == 1
    assert "epochs was 6 and is now 7" in result.stderr


def test_no_file_of_the_project_asserts_outside_the_tests():
    for path in Path(common.__file__).parent.glob("*.py"):
        assert "assert " not in path.read_text(), path


def test_a_plain_locale_shows_names_it_lacks_and_stops_nothing(half_done, pictures):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS), env=plain)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "half done \\udcc3\\udca9" in result.stdout
    assert result.stdout.isascii()


def test_closed_streams_stop_nothing_and_get_into_no_file(half_done, pictures, undisturbed):
    process = start(
        "baseline", *flags(pictures, half_done, EPOCHS), preexec_fn=lambda: [os.close(stream) for stream in (0, 1, 2)]
    )
    assert process.wait() == 0
    assert (half_done / ".lock").read_bytes() == b""
    assert results_of(half_done) == results_of(undisturbed("baseline")[0])


def test_a_reader_that_goes_away_causes_no_traceback(tmp_path):
    process = start("baseline", "--synthetic", "--output-dir", tmp_path / "run")
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        result = run_script("baseline", "--synthetic", "--output-dir", tmp_path / "run", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "error: [Errno 28] No space left on device\n"


def test_line_breaks_and_terminal_codes_in_a_message_are_made_visible():
    with pytest.raises(SystemExit) as ended, common.failures_in_one_line(Config()):
        raise RunError("a\nb\x1b[31mc\udcff \u00e9")
    assert ended.value.code == "error: a\\nb\\x1b[31mc\\udcff \u00e9"


# ---- Many epochs ---------------------------------------------------------------------------------------------------


def check_that_nothing_grows(tmp_path: Path, epochs: int) -> None:
    config = Config(epochs=epochs, batch_size=5, precision="fp32", compile="off", output_dir=tmp_path)
    page, memory, files = os.sysconf("SC_PAGE_SIZE"), [], []
    save_checkpoint = common.save_checkpoint

    def save_and_look(*arguments):
        save_checkpoint(*arguments)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        files.append(len(os.listdir("/proc/self/fd")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save_and_look)
        common.train(train(config, epochs=0)[0], small_data(), config, {"variant": "tiny"}, 0)
    assert len(memory) == epochs
    assert memory[-1] - memory[epochs // 4] < 4 << 20  # bytes
    assert len(set(files)) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_many_epochs_leave_memory_and_open_files_flat_and_one_checkpoint(tmp_path):
    check_that_nothing_grows(tmp_path, 120)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_epochs_leave_memory_and_open_files_flat_and_one_checkpoint(tmp_path):
    check_that_nothing_grows(tmp_path, 1000)


# ---- Compilation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Give compiled code a place of its own, and return it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    return tmp_path / "torch" / "compiled"


def test_compiled_code_is_kept_unless_its_making_was_cut_short(own_cache):
    with common.compiling():
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == own_cache
        (own_cache / "code").touch()
        assert (own_cache / "compiling").exists()
    with common.compiling():
        assert (own_cache / "code").exists()

    def die() -> None:
        with common.compiling():
            (own_cache / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child("", die) == -signal.SIGKILL
    assert (own_cache / "half").exists()
    with common.compiling():
        assert [file.name for file in own_cache.iterdir()] == ["compiling"]


def test_compiled_code_lies_where_compilers_find_it_also_when_the_home_has_a_space(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "two words"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    with common.compiling():
        assert " " not in os.environ["TORCHINDUCTOR_CACHE_DIR"]


class Noisy(nn.Module):
    """Counts its training calls, as BN does, and has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(3)), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x).mean((2, 3)) * self.scale


def test_compiling_leaves_the_network_as_it_was(own_cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    data, config, network = small_data(), Config(batch_size=5, precision="fp32"), Noisy()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    forward, calls = common.make_forward(network, data, config), []

    def loss_of(images, labels):
        calls.append(len(images))
        return nn.functional.cross_entropy(forward(images), labels)

    common.compile_loss(loss_of, common.State(network, Noisy(), []), data, config)
    assert calls == [5]
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [parameter.grad for parameter in network.parameters()] == [None] * 3


@pytest.mark.slow
def test_a_death_while_compiling_spoils_no_later_run(tmp_path, pictures, undisturbed):
    """The cache of compiled code is cold, and the whole process group dies, as when a machine runs out of memory."""
    reference, _ = undisturbed("baseline", *DEFAULTS)
    for trial in range(4):
        home, output = tmp_path / f"home-{trial}", tmp_path / f"run {trial}"
        environment = {"TORCH_HOME": str(home), "TMPDIR": str(tmp_path)}
        command = ("baseline", *flags(pictures, output, EPOCHS), *DEFAULTS)
        process = start(*command, env=environment, start_new_session=True)
        wait_for(home / "compiled" / "compiling", process)
        time.sleep(random.uniform(0, 30))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        result = run_script(*command, env=environment)
        assert result.returncode == 0, result.stderr
        assert "notice" not in result.stdout, result.stdout
        assert results_of(output) == results_of(reference)


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_one_line_too(tmp_path, pictures):
    environment = {"TORCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    command = ("baseline", *flags(pictures, tmp_path / "run", EPOCHS), *DEFAULTS)
    for seconds in (3, 9, 15):
        process = start(*command, env=environment, start_new_session=True)
        wait_for(tmp_path / "home" / "compiled" / "compiling", process)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert [line for line in errors.splitlines() if "CUDA runtime" not in line] == [
            "interrupted; the same command (without --fresh) continues after the last finished epoch"
        ]
