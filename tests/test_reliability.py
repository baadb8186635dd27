"""Whatever happens to the machine, no run is lost and no number wrong: real scripts, real signals, real limits."""

import builtins
import contextlib
import csv
import ctypes
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    REPOSITORY,
    equal_runs,
    flags,
    new_tiny,
    run_script,
    run_script_here,
    small_data,
    start,
    train,
    wait_for,
    write_folders,
)

import common
from training import checkpoint, devices, files
from training.checkpoint import State
from training.config import Config, RunError, stop_on_interrupt
from training.files import RunFolder, open_run_folder

EPOCHS = 5
BOTH = pytest.mark.parametrize("variant", ["baseline", "enhanced"])
COMPILED = ("--compile", "on", "--threads", 2)  # as a long run
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = [
    pytest.mark.xdist_group("reliability"),  # the undisturbed runs are made once, for one worker
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def epoch_of(run: Path) -> int:
    return checkpoint.load(run / "checkpoint.pt")["epoch"] if (run / "checkpoint.pt").exists() else 0


def same_results(one: Path, other: Path) -> bool:
    """Return whether two finished runs are equal but for the times, and have nothing left over."""
    tables = [[row[:-2] for row in csv.reader((run / "metrics.csv").open())] for run in (one, other)]
    leftovers = list(one.glob("*.tmp"))
    return equal_runs(one / "checkpoint.pt", other / "checkpoint.pt") and tables[0] == tables[1] and not leftovers


def in_a_child(function: Callable[[], int | None]) -> int:
    """Run a function in a forked process and return its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = function() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_script_in_a_child(before: Callable[[], object], *arguments: object) -> subprocess.CompletedProcess:
    """Run a script in a forked process after `before` has changed this process."""
    reader, writer = os.pipe()

    def run() -> None:
        before()
        result = run_script_here(*arguments)
        os.write(writer, json.dumps([result.returncode, result.stdout, result.stderr]).encode())

    status = in_a_child(run)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    assert text, f"it ended with status {status}"
    return subprocess.CompletedProcess(arguments, *json.loads(text))


def stop_in_epoch(last: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script in this process until it begins this epoch."""
    train_epoch = common.train_epoch

    def stop(*given: object) -> tuple[float, float]:
        if given[4] == last:
            raise RunError("stopped")
        return train_epoch(*given)

    with mock.patch.object(common, "train_epoch", stop):
        result = run_script_here(*arguments)
    assert result.stderr == "error: stopped\n"
    return result


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
def two_epochs(place, pictures):
    stop_in_epoch(3, "baseline", *flags(pictures, place / "two epochs", EPOCHS))
    return place / "two epochs"


@pytest.fixture
def half_done(two_epochs, tmp_path):
    """Return the folder of a run of the baseline that has done two of its epochs."""
    return shutil.copytree(two_epochs, tmp_path / "half done \u00e9")


# ---- Kills ---------------------------------------------------------------------------------------------------------


def check_kills(variant: str, count: int, tmp_path: Path, pictures: Path, undisturbed, *more: object) -> None:
    """Kill runs at `count` random moments; what is resumed must not go back, and must end as if nothing had been."""
    (reference, seconds), seed = undisturbed(variant, *more), random.randrange(10**6)
    moments, kills, finished = random.Random(seed), 0, 0
    print(f"moments drawn with seed {seed}")  # shown when the test fails
    while kills < count or not finished:
        output, before = tmp_path / f"run {finished}", epoch_of(tmp_path / f"run {finished}")
        process = start(variant, *flags(pictures, output, EPOCHS), *more, stdout=None, stderr=None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, seconds * (1 - before / EPOCHS / 2)) if kills < count else 240)
        kills += process.poll() is None
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
        assert epoch_of(output) >= before
        if code == 0:
            assert same_results(output, reference)
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
def test_so_does_one_that_is_compiled(variant, tmp_path, pictures, undisturbed):
    check_kills(variant, 20, tmp_path, pictures, undisturbed, *COMPILED)


def die_at_call(number: int) -> None:
    """Let this process be killed at its `number`th call from now on of those that open, sync and rename files."""
    calls = itertools.count(1)

    def deadly(function: Callable) -> Callable:
        def call(*arguments, **more):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)

        return call

    for module, name in ((builtins, "open"), *((os, name) for name in ("open", "fsync", "replace", "link", "unlink"))):
        setattr(module, name, deadly(getattr(module, name)))


def refuse(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("links", ["hard links", "no hard links"])
def test_a_death_at_any_call_of_the_save_leaves_the_old_file_or_the_new_one(links, tmp_path, monkeypatch):
    if links == "no hard links":  # the previous checkpoint is a copy
        monkeypatch.setattr(os, "link", refuse)
    config = Config(epochs=3, batch_size=5, precision="fp32")
    data = small_data()
    identity = common.run_identity("tiny", {}, data, config, None, None)
    path, states = tmp_path / "run" / "checkpoint.pt", [train(config, data, epochs)[0] for epochs in (1, 2)]
    outcomes, status = [], -signal.SIGKILL
    for death in itertools.count(1):
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        checkpoint.save(path, states[0], 1, identity, [])

        def save(death: int = death) -> None:
            die_at_call(death)
            checkpoint.save(path, states[1], 2, identity, [])

        status = in_a_child(save)
        outcomes.append(checkpoint.load(path)["epoch"])
        if checkpoint.previous_of(path).exists() and links == "hard links":
            checkpoint.load(checkpoint.previous_of(path))
        checkpoint.save(path, states[1], 2, identity, [])  # over whatever was left
        assert sorted(os.listdir(path.parent)) == ["checkpoint.previous.pt", "checkpoint.pt"]
        if status != -signal.SIGKILL:
            break
    assert status == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(1) >= 4 and outcomes.count(2) >= 2


def test_a_death_in_the_middle_of_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def write() -> None:
        with files.atomic_write(path) as file:
            file.write(b"n")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(write) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert path.with_name("checkpoint.pt.tmp").read_bytes() == b"n"


@pytest.mark.slow
def test_a_run_that_dies_at_any_call_while_it_saves_ends_as_if_nothing_had_been(
    tmp_path, pictures, undisturbed, half_done
):
    reference, _ = undisturbed("baseline")
    check_lock, status = RunFolder.check_lock, -signal.SIGKILL
    for death in itertools.count(1, 2):
        output = shutil.copytree(half_done, tmp_path / str(death))
        command = ("baseline", *flags(pictures, output, EPOCHS))

        def check_and_die(folder: RunFolder, death: int = death) -> None:
            check_lock(folder)  # what comes before each save
            if epoch_of(folder.path) == 2:
                die_at_call(death)

        with mock.patch.object(RunFolder, "check_lock", check_and_die):
            status = in_a_child(lambda command=command: run_script_here(*command).returncode)
        assert status in (0, -signal.SIGKILL)
        assert run_script_here(*command).returncode == 0
        assert same_results(output, reference)
        shutil.rmtree(output)
        if status == 0:
            break
    assert death > 20


# ---- Signals -------------------------------------------------------------------------------------------------------

INTERRUPTED = "interrupted; the same command (without --fresh) resumes after the last finished epoch"
SLOW_SAVE = """
import os, pathlib, time
replace = os.replace
def slowly(source, target):
    if str(target).endswith("checkpoint.pt"):
        pathlib.Path({mark!r}).touch()
        time.sleep(5)
    replace(source, target)
os.replace = slowly
"""


@pytest.mark.parametrize("where", ["once while training", "twice in a save"])
def test_ctrl_c_ends_in_one_line_with_status_130_and_the_same_command_resumes(
    where, half_done, pictures, tmp_path, undisturbed
):
    mark = tmp_path / "saving"
    saving, rows = where == "twice in a save", half_done / "metrics.csv"
    patch = SLOW_SAVE.format(mark=str(mark)) if saving else ""
    rows.unlink()  # written anew after the first epoch
    process = start(
        *("baseline", *flags(pictures, half_done, EPOCHS)),
        patch=patch,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the tests may run in the background
    )
    wait_for(mark if saving else rows, process)
    process.send_signal(signal.SIGINT)
    if saving:
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert set(errors.split("\n")) == {"", INTERRUPTED}
    assert (half_done / "checkpoint.pt.tmp").exists() == saving
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS))
    assert f"resuming after epoch {2 if saving else 3}, bit for bit as without this interruption" in result.stdout
    assert same_results(half_done, undisturbed("baseline")[0])


def test_code_that_swallows_exceptions_does_not_make_a_run_deaf_to_ctrl_c():
    def swallow() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(BaseException):
            stop_on_interrupt()
            signal.raise_signal(signal.SIGINT)
        return 7

    assert in_a_child(swallow) == 130


def test_a_run_in_the_background_stays_deaf_to_ctrl_c():
    def ignore() -> int:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does after `&`
        stop_on_interrupt()
        signal.raise_signal(signal.SIGINT)
        return 7

    assert in_a_child(ignore) == 7


def test_a_second_run_in_a_busy_folder_that_is_interrupted_touches_nothing_of_the_first_one(half_done, pictures):
    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in half_done.iterdir()}

    def interrupt(*_: object, **__: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_on_interrupt()
        signal.raise_signal(signal.SIGINT)

    with open_run_folder(half_done):
        (half_done / "checkpoint.pt.tmp").write_text("half")  # the first one is saving
        before = content()
        with mock.patch.object(files.fcntl, "flock", interrupt):  # Ctrl-C just before it is refused
            assert in_a_child(lambda: run_script_here("baseline", *flags(pictures, half_done)).returncode) == 130
        assert content() == before


def test_sigterm_ends_a_run_at_once_and_the_same_command_resumes_it(half_done, pictures, undisturbed):
    (half_done / "metrics.csv").unlink()
    process = start("baseline", *flags(pictures, half_done, EPOCHS))
    wait_for(half_done / "metrics.csv", process)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS))
    assert "resuming after epoch " in result.stdout
    assert same_results(half_done, undisturbed("baseline")[0])


# ---- Starting over -------------------------------------------------------------------------------------------------


def test_a_fresh_run_that_was_killed_begins_anew_when_its_command_is_started_again(half_done, pictures, undisturbed):
    command = ("baseline", *flags(pictures, half_done, EPOCHS), "--fresh")
    kept = ["checkpoint.pt", "metrics.csv"]
    for epoch in (1, 2):
        header = stop_in_epoch(epoch, *command).stdout
        assert f"{half_done}, 0 of {EPOCHS} epochs done\n" in header
        assert "Ctrl-C stops; leave out --fresh to resume after the last finished epoch" in header
        assert {file.name for file in half_done.iterdir()} == {".lock", *kept[: 2 * (epoch - 1)]}
    result = run_script_here(*command[:-1])
    assert "resuming after epoch 1, bit for bit" in result.stdout
    assert same_results(half_done, undisturbed("baseline")[0])


def test_a_fresh_run_that_torchrun_restarts_resumes_what_it_began(half_done, pictures, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS), "--fresh")
    assert result.returncode == 0, result.stderr
    assert "resuming after epoch 2" in result.stdout


def test_a_fresh_run_that_dies_before_it_trains_is_still_fresh_when_torchrun_restarts_it(
    half_done, pictures, monkeypatch
):
    command = ("baseline", *flags(pictures, half_done, EPOCHS), "--fresh")
    with monkeypatch.context() as patch:
        patch.setattr(common, "train", mock.Mock(side_effect=RunError("died")))
        assert run_script_here(*command).stderr == "error: died\n"
    assert epoch_of(half_done) == 2  # what it will replace is still there
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_script_here(*command)
    assert result.returncode == 0, result.stderr
    assert f"{half_done}, 0 of {EPOCHS} epochs done" in result.stdout
    assert not (half_done / ".fresh").exists()


def test_metrics_that_cannot_be_written_stop_no_training_but_are_missed_at_its_end(half_done, pictures):
    (half_done / "metrics.csv").unlink()
    (half_done / "metrics.csv").mkdir()
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS))
    assert result.returncode == 1
    assert result.stderr.count(f"notice: {half_done / 'metrics.csv'} cannot be written") == EPOCHS - 2
    assert f"error: {half_done / 'metrics.csv'} cannot be written" in result.stderr
    assert epoch_of(half_done) == EPOCHS


# ---- Disks and places ----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_with_path_and_cause_and_leaves_the_checkpoint_whole(half_done, pictures):
    before = (half_done / "checkpoint.pt").read_bytes()
    limit = len(before) // 2
    result = run_script_in_a_child(
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        *("baseline", *flags(pictures, half_done, EPOCHS)),
    )
    assert result.returncode == 1
    assert result.stderr == f"error: {half_done / 'checkpoint.pt'} cannot be written: File too large\n"
    assert (half_done / "checkpoint.pt").read_bytes() == before
    assert not list(half_done.glob("*.tmp"))


def drop_capabilities() -> None:
    """Make root obey the permissions of files, as other users do."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@LINUX
@pytest.mark.parametrize("where", ["it", "parent"])
def test_a_place_that_cannot_be_written_is_refused(where, tmp_path):
    output = tmp_path / "read-only" / "run"
    (output if where == "it" else output.parent).mkdir(parents=True)
    (output if where == "it" else output.parent).chmod(0o555)
    code = f"""
from pathlib import Path
from training.config import errors_in_one_line
from training.files import open_run_folder
with errors_in_one_line(), open_run_folder(Path({str(output)!r})):
    print("opened")
"""
    options = dict(cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=drop_capabilities)
    result = subprocess.run([sys.executable, "-c", code], **options)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: --output-dir {output}: ")
    assert result.stderr.endswith("Permission denied\n")


# ---- Numbers that are not finite, memory, devices ------------------------------------------------------------------


def train_in(tmp_path: Path, config: Config) -> None:
    """Train the small network as a run does, with its checkpoints in this folder."""
    data = small_data()
    with open_run_folder(tmp_path) as folder:
        common.train(
            new_tiny(config), data, config, common.run_identity("tiny", {}, data, config, None, None), [], folder
        )


THREE_EPOCHS = Config(epochs=3, batch_size=5, precision="fp32", compile="off")  # of four steps


def test_a_bad_loss_stops_the_run_before_its_epoch_is_saved(tmp_path, monkeypatch):
    calls, cross_entropy = [], common.F.cross_entropy

    def bad_in_epoch_2(*arguments, **more):
        calls.append(None)
        loss = cross_entropy(*arguments, **more)
        return loss * math.nan if len(calls) == 4 + 1 + 4 else loss  # one call was of the evaluation

    monkeypatch.setattr(common.F, "cross_entropy", bad_in_epoch_2)
    with pytest.raises(RunError, match="the loss became nan in epoch 2, step 4, at a learning"):
        train_in(tmp_path, THREE_EPOCHS)
    assert epoch_of(tmp_path) == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize(("network", "weights"), [("raw", "raw weights"), ("averaged", "EMA weights")])
def test_a_bad_statistic_behind_good_losses_stops_the_run_before_its_epoch_is_saved(
    network, weights, tmp_path, monkeypatch
):
    train_epoch = common.train_epoch

    def bad_in_epoch_2(state: State, *arguments: object) -> tuple[float, float]:
        result = train_epoch(state, *arguments)
        if arguments[3] == 2:
            getattr(state, network).norm.running_var[0] = math.inf
        return result

    monkeypatch.setattr(common, "train_epoch", bad_in_epoch_2)
    message = rf"norm\.running_var of the {weights} is not finite after epoch 2"
    with pytest.raises(RunError, match=message):
        train_in(tmp_path, THREE_EPOCHS)
    assert epoch_of(tmp_path) == 1


def test_a_rate_far_too_high_ends_in_one_line_and_nothing_is_saved(tmp_path, pictures):
    result = run_script_here("enhanced", *flags(pictures, tmp_path / "run"), "--learning-rate", "1e20")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "after epoch 1, with a learning rate of up to 1e+20" in result.stderr
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:120] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_out_of_memory_is_one_line_that_names_the_batch_size(error, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "run", mock.Mock(side_effect=error))
    result = run_script_here("baseline", "--output-dir", tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: out of memory; a smaller --batch-size or --image-size needs less\n"


@LINUX
def test_pictures_too_large_for_the_memory_end_in_one_line_and_change_nothing(pictures, tmp_path):
    def limit_memory() -> None:
        used = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (300 << 20),) * 2)

    command = ("baseline", *flags(pictures, tmp_path / "run"), "--image-size", 512)
    result = run_script_in_a_child(limit_memory, *command)
    assert result.returncode == 1
    assert result.stderr == "error: out of memory; a smaller --batch-size or --image-size needs less\n"
    assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name, tmp_path):
    if getattr(torch, name).is_available():
        pytest.skip(f"this machine has {name}")
    result = run_script_here("baseline", "--synthetic", "--device", name, "--output-dir", tmp_path / "run")
    assert result.returncode == 1
    assert re.fullmatch(rf"error: --device {name}: not available here, only ((cuda|mps), )?cpu\n", result.stderr)


def test_a_run_of_other_threads_and_processes_resumes_and_the_header_says_what_differs(half_done, pictures):
    saved = checkpoint.load(half_done / "checkpoint.pt")
    del saved["sha256"]
    saved["environment"] |= {"threads": 2, "processes": 3}
    checkpoint.write(half_done / "checkpoint.pt", saved)
    result = run_script_here("baseline", *flags(pictures, half_done, EPOCHS))
    assert result.returncode == 0, result.stderr
    differs = "threads was 2 and is now 1; processes was 3 and is now 1"
    assert f"resuming after epoch 2, but not bit for bit: {differs}\n" in result.stdout
    assert epoch_of(half_done) == EPOCHS


# ---- Ways of starting ----------------------------------------------------------------------------------------------


def test_the_weights_are_the_same_when_optimized_and_with_warnings_as_errors(half_done, pictures, undisturbed):
    parts = [f"training.{path.stem}" for path in (REPOSITORY / "training").glob("*.py")]
    names = ("common", "mobilenetv4_baseline", "__main__", *parts)  # -W takes no patterns
    strict = [word for name in names for word in ("-W", f"error:::{name}")]
    result = run_script("baseline", *flags(pictures, half_done, EPOCHS), python=("-O", *strict))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert same_results(half_done, undisturbed("baseline")[0])


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
    assert same_results(half_done, undisturbed("baseline")[0])


def test_a_reader_that_goes_away_causes_no_traceback(half_done, pictures):
    process = start("baseline", *flags(pictures, half_done, EPOCHS))
    process.stdout.close()  # as `| head` does
    assert process.stderr.read() == ""
    assert process.wait() == 1


# ---- Many epochs ---------------------------------------------------------------------------------------------------


def check_that_nothing_grows(tmp_path: Path, epochs: int) -> None:
    page, memory, opened, save = os.sysconf("SC_PAGE_SIZE"), [], [], checkpoint.save

    def save_and_look(*arguments: object) -> None:
        save(*arguments)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        opened.append(len(os.listdir("/proc/self/fd")))

    with mock.patch.object(checkpoint, "save", save_and_look):
        train_in(tmp_path, Config(epochs=epochs, batch_size=5, precision="fp32", compile="off"))
    assert len(memory) == epochs
    assert memory[-1] - memory[epochs // 4] < 4 << 20  # bytes
    assert len(set(opened)) == 1
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.previous.pt", "checkpoint.pt", "metrics.csv"]


@LINUX
def test_many_epochs_leave_memory_and_open_files_flat_and_two_checkpoints(tmp_path):
    check_that_nothing_grows(tmp_path, 120)


@pytest.mark.slow
@LINUX
def test_a_thousand_epochs_leave_memory_and_open_files_flat_and_two_checkpoints(tmp_path):
    check_that_nothing_grows(tmp_path, 1000)


# ---- Compilation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Give compiled code a place of its own, and return it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # put back afterwards, whatever the test does
    devices.can_compile.cache_clear()
    yield tmp_path / "torch" / "compiled"
    devices.can_compile.cache_clear()


def test_compiled_code_is_kept_unless_its_making_was_cut_short(own_cache):
    for _ in range(2):
        with devices.compile_cache():
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own_cache)
            (own_cache / "code").touch()
    assert os.listdir(own_cache) == ["code"]

    def die() -> None:
        with devices.compile_cache():
            (own_cache / "half").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(die) == -signal.SIGKILL
    assert (own_cache / "half").exists()
    with devices.compile_cache():
        assert not {"code", "half"} & set(os.listdir(own_cache))


def test_a_cache_of_compiled_code_that_the_user_chose_is_used_as_it_is(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    with devices.compile_cache():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not list(tmp_path.iterdir())


def test_compiled_code_lies_where_compilers_find_it_also_when_the_home_has_a_space(own_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "two words"))
    with devices.compile_cache():
        assert " " not in os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")


def test_where_compiling_does_not_work_a_run_says_so_and_trains_and_the_summary_says_what_was(
    own_cache, pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no compiler\nfound")))
    command = ("baseline", *flags(pictures, tmp_path / "run", 1), "--compile", "on")
    result = run_script_here(*command)
    assert result.returncode == 0, result.stderr
    notice = "notice: torch.compile does not work here, training uncompiled and slower (no compiler found)\n"
    assert result.stdout.count(notice) == result.stdout.count("notice") == 1
    assert ", compiled" not in result.stdout
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["compiled"] is False
    monkeypatch.undo()  # the compiler is back
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert (saved["recipe"]["compile"], saved["environment"]["compiled"]) == ("on", False)


def test_pytorch_does_not_complain_of_a_missing_gpu_when_it_compiles_for_a_cpu(tmp_path):
    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("only a PyTorch for CUDA without a GPU complains")
    code = """
import torch
from training import devices
devices.set_up(torch.device("cpu"))
import torch.utils.cpp_extension  # which the compiler imports
"""
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_a_death_while_compiling_spoils_no_later_run(tmp_path, pictures, undisturbed):
    """The cache of compiled code is cold, and the whole process group dies, as when a machine runs out of memory."""
    reference, _ = undisturbed("baseline", *COMPILED)
    for trial in range(4):
        home, output = tmp_path / f"home-{trial}", tmp_path / f"run {trial}"
        environment = {"TORCH_HOME": str(home), "TMPDIR": str(tmp_path), "CUDA_HOME": str(tmp_path)}
        command = ("baseline", *flags(pictures, output, EPOCHS), *COMPILED)
        process = start(*command, env=environment, start_new_session=True)
        wait_for(home / "compiled" / "unfinished", process)
        time.sleep(random.uniform(0, 30))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        result = run_script(*command, env=environment)
        assert result.returncode == 0, result.stderr
        assert "notice" not in result.stdout
        assert result.stderr == ""
        assert same_results(output, reference)


@pytest.mark.slow
def test_ctrl_c_while_compiling_is_one_line_too(tmp_path, pictures):
    environment = {"TORCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "CUDA_HOME": str(tmp_path)}
    command = ("baseline", *flags(pictures, tmp_path / "run", EPOCHS), *COMPILED)
    for seconds in (3, 9, 15):
        process = start(*command, env=environment, start_new_session=True)
        wait_for(tmp_path / "home" / "compiled" / "unfinished", process)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert set(errors.split("\n")) == {"", INTERRUPTED}
