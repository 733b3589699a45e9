"""torchrun splits runs over processes: same results as one process, also after the death of a rank."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cifar_fast.training.fit
from cifar_fast import InputError, Recipe, fit, load_model
from cifar_fast.backends.select import BackendConfig, local_device
from cifar_fast.cli.main import main as command
from cifar_fast.train import main
from cifar_fast.training.config import TrainConfig
from cifar_fast.training.fit import Training, train_all
from cifar_fast.utils import distributed
from cifar_fast.utils.distributed import World
from cifar_fast.utils.progress import lines_to
from tests.helpers import HOW, ROOT, contents, files_in, files_of, save_npz, small_dataset, stop_after

RECIPE = Recipe(epochs=30, batch_size=16, widths=(4, 8))
FLAGS = "--dataset npz --widths 4 8 --epochs 30 --batch-size 16 --device cpu --dtype float32 --backend eager --seed 3"
SPEC = """
dataset = "npz"
data_dir = "{data}"
output = "{output}"
runs = 2
backend = "eager"
device = "cpu"
dtype = "float32"
[recipe]
epochs = {epochs}
batch_size = 16
widths = [4, 8]
[variants.baseline]
[variants.momentum]
momentum = 0.8
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, npz, no_curves):
    """The folder of three runs that one process trained."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    assert main(f"{FLAGS} --data-dir {npz} --runs 3 --save-logits --output {folder}".split()) == 0
    return folder


def torchrun(flags, processes=2, module="cifar_fast.train", restarts=0, cwd=None):
    """Start ``module`` with ``flags`` under torchrun and return torchrun's process."""
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment)
    return subprocess.Popen([*launcher, "-m", module, *flags.split()], **settings)


def ended(process):
    """Wait for ``process`` and return its exit code, the lines of its output, and our lines of its standard error.

    torchrun's own lines are left out.
    """
    out, error = process.communicate(timeout=240)
    ours = [line for line in error.splitlines() if line.startswith(("error: ", "interrupted"))]
    assert "cifar_fast/" not in error, "a traceback of ours"
    return process.returncode, out.splitlines(), ours


def kill_when(process, rank, file):
    """Wait until ``file`` exists, then kill the child of torchrun's ``process`` that has that rank."""
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            os.kill(int(child), signal.SIGKILL)


@pytest.fixture(scope="module")
def original(tmp_path_factory, npz):
    """The folder of three runs that two processes shared until rank 1 was killed in its first run."""
    folder = tmp_path_factory.mktemp("original") / "shared"
    process = torchrun(f"{FLAGS} --data-dir {npz} --runs 3 --save-logits --output {folder}")
    kill_when(process, 1, folder / "run-1/checkpoint.pt")
    code, _, ours = ended(process)
    assert code == 1 and ours in ([], [f"interrupted; to resume: cifar-fast train --resume {folder}"])
    return folder


@pytest.fixture
def killed(tmp_path, original):
    """A copy of that folder."""
    return shutil.copytree(original, tmp_path / "shared")


def epochs_in(lines):
    """Return the epochs that the log ``lines`` report."""
    return [int(line.split()[1]) for line in lines if line.startswith("epoch ")]


@pytest.mark.slow  # starts processes
def test_two_processes_write_the_same_results_as_one(tmp_path, npz, whole):
    process = torchrun(f"{FLAGS} --data-dir {npz} --runs 3 --save-logits --output {tmp_path}/shared")
    code, lines, errors = ended(process)
    assert (code, errors) == (0, [])
    assert contents(tmp_path / "shared") == contents(whole)
    assert (tmp_path / "shared/logits.npz").read_bytes() == (whole / "logits.npz").read_bytes()
    runs = [line for line in lines if line.startswith("run ")]
    assert runs == ["run 0 of 3, seed 3", "run 2 of 3, seed 5"], "rank 0 prints only its own runs"


@pytest.mark.slow  # starts processes
def test_single_process_resumes_after_a_rank_was_killed(killed, whole, capfd, no_curves):
    assert main(["--resume", str(killed)]) == 0
    output = capfd.readouterr().out
    assert "resuming after epoch" in output and len(epochs_in(output.splitlines())) < 3 * 30
    assert contents(killed) == contents(whole)
    assert (killed / "logits.npz").read_bytes() == (whole / "logits.npz").read_bytes()


@pytest.mark.slow  # starts processes
def test_fit_resumes_a_shared_training_with_its_threads(killed, whole, tiny, no_curves, monkeypatch):
    monkeypatch.setattr(cifar_fast.training.fit, "DEFAULT_NUM_THREADS", 2)
    result = fit(RECIPE, tiny, resume=killed, runs=3, seed=3, save_logits=True, **HOW)
    assert contents(killed, "data_source") == contents(whole, "data_source") and len(result.rows) == 3 * 30


@pytest.mark.slow  # starts processes
def test_shared_training_is_kept_without_overwrite(npz, killed, capfd, no_curves):
    flags = f"{FLAGS} --epochs 1 --data-dir {npz} --output {killed}".split()
    assert main(flags) == 2
    assert "--resume to continue it, --overwrite to replace" in capfd.readouterr().err
    for changed, words in {"--seed 4": "--seed was 3", "--runs 2": "--runs was 3"}.items():
        assert main(["--resume", str(killed), *changed.split()]) == 2
        assert words in capfd.readouterr().err
    assert (killed / "run-1/checkpoint.pt").exists()
    assert main([*flags, "--overwrite"]) == 0
    assert files_in(killed) == files_of(1)


@pytest.mark.slow  # whole trainings
def test_resume_by_command_after_fit_and_with_more_runs(tmp_path, tiny, npz, capfd, no_curves):
    recipe = Recipe(epochs=3, batch_size=16, widths=(4, 8))
    options = HOW | {"seed": 3}
    folder, lines = tmp_path / "shared", []
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tiny, runs=2, output=folder, **options | {"log": stop_after((1, 3))})
    fit(recipe, tiny, runs=2, resume=folder, **options | {"log": lines.append})
    assert "resuming after epoch 2" in lines
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tiny, runs=4, resume=folder, **options | {"log": stop_after((2, 2))})
    assert main(["--resume", str(folder), "--data-dir", str(npz)]) == 0, "the folder knows the number of runs"
    assert epochs_in(capfd.readouterr().out.splitlines()) == [2, 3, 1, 2, 3]
    fit(recipe, tiny, runs=4, output=tmp_path / "whole", **options)
    assert contents(folder, "data_source") == contents(tmp_path / "whole", "data_source")


@pytest.mark.slow  # whole trainings
def test_run_by_another_backend_is_an_error_and_costs_no_other_run(tmp_path, npz, capfd, monkeypatch, no_curves):
    flags = f"{FLAGS} --data-dir {npz} --epochs 2 --runs"
    folder = tmp_path / "shared"
    assert main(f"{flags} 1 --output {folder}".split()) == 0
    with lines_to(stop_after((2, 1))):
        assert main(["--resume", str(folder), "--runs", "3"]) == 130
    saved = json.loads((folder / "run-1/result.json").read_text())
    saved["backend"] = "compiled"  # as if auto had chosen another backend on that rank
    (folder / "run-1/result.json").write_text(json.dumps(saved))
    assert main(["--resume", str(folder)]) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {folder}: run 1 was trained by compiled, and others by eager; name a --backend")
    summary = json.loads((folder / "summary.json").read_text())
    assert [run["run"] for run in summary["runs"]] == [0, 2] and summary["missing"] == [dict(run=1, seed=4)]


@pytest.mark.nightly  # starts processes several times
def test_rank_0_names_the_folder_and_replaces_earlier_results(tmp_path, npz):
    flags = f"{FLAGS} --data-dir {npz} --epochs 2 --runs"
    code, _, errors = ended(torchrun(f"{flags} 2", cwd=tmp_path))
    assert (code, errors) == (0, [])
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(json.loads((folder / "summary.json").read_text())["runs"]) == 2
    code, _, errors = ended(torchrun(f"{flags} 1 --seed 9 --overwrite --output {folder}"))
    assert (code, errors) == (0, [])
    assert [run["seed"] for run in json.loads((folder / "summary.json").read_text())["runs"]] == [9]
    assert files_in(folder) == files_of(1)


@pytest.mark.nightly  # starts processes several times
def test_resume_with_other_numbers_of_processes_and_more_runs(tmp_path, npz, no_curves):
    """One process begins. Two resume until rank 0 is killed. Three finish, with one more run."""
    flags = f"{FLAGS} --data-dir {npz} --log tensorboard --runs"
    assert main(f"{flags} 5 --output {tmp_path}/whole".split()) == 0
    folder = tmp_path / "parts"
    command_line = [sys.executable, "-m", "cifar_fast.train", *f"{flags} 4 --output {folder}".split()]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("run 1 of 4"):
        assert process.poll() is None
    process.stdout.readline()
    process.kill()
    process.communicate()
    process = torchrun(f"--resume {folder}")
    kill_when(process, 0, folder / "run-2/checkpoint.pt")
    assert ended(process)[0] == 1
    code, _, errors = ended(torchrun(f"--resume {folder} --runs 5", processes=3))
    assert (code, errors) == (0, []) and contents(folder) == contents(tmp_path / "whole")
    assert sorted(os.listdir(folder / "tensorboard")) == [f"run-{run}" for run in range(5)]
    code, lines, errors = ended(torchrun(f"--resume {folder}"))
    assert (code, errors, len(lines)) == (0, [], 1) and lines[0].startswith("nothing to do: ")


@pytest.mark.nightly  # starts processes several times
def test_shared_sweep_resumes_by_the_same_command(tmp_path, npz, no_curves, capfd):
    def sweep_of(folder):
        (tmp_path / f"{folder}.toml").write_text(SPEC.format(data=npz, output=tmp_path / folder, epochs=30))
        return f"sweep {tmp_path}/{folder}.toml"

    names = ("baseline", "momentum")
    assert command(sweep_of("whole").split()) == 0
    process = torchrun(sweep_of("restarted"), module="cifar_fast", restarts=1)
    kill_when(process, 1, tmp_path / "restarted/momentum/run-0/checkpoint.pt")
    code, lines, _ = ended(process)
    assert code == 0 and lines[-1].startswith("written to ")
    process = torchrun(sweep_of("killed"), module="cifar_fast")
    kill_when(process, 1, tmp_path / "killed/momentum/run-0/checkpoint.pt")
    assert ended(process)[0] == 1
    shutil.copytree(tmp_path / "killed", tmp_path / "single")
    code, _, errors = ended(torchrun(sweep_of("killed"), module="cifar_fast"))
    assert (code, errors) == (0, [])
    capfd.readouterr()
    assert command([*sweep_of("single").split(), "--dry-run"]) == 0
    assert "run 0 of momentum, seed 0: will resume after epoch" in capfd.readouterr().out
    assert command(sweep_of("single").split()) == 0
    for folder in ("restarted", "killed", "single"):
        assert sorted(os.listdir(tmp_path / folder)) == ["baseline", "momentum", "sweep.json"]
        for name in names:
            assert contents(tmp_path / folder / name) == contents(tmp_path / "whole" / name)


@pytest.mark.nightly  # starts processes several times
def test_bad_input_under_torchrun_is_one_line_and_writes_nothing(tmp_path, npz, whole):
    before = sorted(os.listdir(whole))
    flags = f"{FLAGS} --data-dir {npz}"
    for wrong, words in {
        f"{flags} --output {whole}": f"error: {whole} already holds results",
        f"{flags} --nonsense": "error: unrecognized arguments: --nonsense",
        f"{flags} --batch-size 64 --runs 2 --output {tmp_path}/out": "error: ",
        f"{FLAGS} --data-dir {tmp_path}/none.npz --output {tmp_path}/out": "error: ",
        f"{flags} --also-test a={tmp_path}/none --runs 2 --output {tmp_path}/out": "error: ",
    }.items():
        code, lines, errors = ended(torchrun(wrong))
        if "--nonsense" in wrong:  # each process checks its flags before it joins the others
            errors = errors[:1] if len(set(errors)) == 1 else errors
        assert code == 1 and len(errors) == 1 and errors[0].startswith(words), (lines, errors)
    assert not os.listdir(tmp_path) and sorted(os.listdir(whole)) == before


@pytest.mark.nightly  # starts processes
def test_diverged_variant_costs_no_other_under_torchrun(tmp_path, npz):
    text = SPEC.format(data=npz, output=tmp_path / "sweep", epochs=2) + "lr_values = [1e30, 1e30, 0]\n"
    (tmp_path / "spec.toml").write_text(text)
    code, _, errors = ended(torchrun(f"sweep {tmp_path}/spec.toml", module="cifar_fast"))
    told = [f"error: momentum: run {seed} of 2, seed {seed}: the loss is not finite" for seed in (0, 1)]
    assert code == 1 and len(errors) == 2 and all(map(str.startswith, errors, told))
    assert len(json.loads((tmp_path / "sweep/baseline/summary.json").read_text())["runs"]) == 2


def start_rank(flags, rank, port, program=("-m", "cifar_fast.train")):
    """Start one of two ranks as torchrun would start it."""
    world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment = os.environ | {name: str(value) for name, value in world.items()}
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([sys.executable, *program, *flags.split()], **settings)


def start_both_ranks(flags, file=None, program=("-m", "cifar_fast.train")):
    """Start both ranks, wait until ``file`` exists, and return the processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    both = start_rank(flags, 0, port, program), start_rank(flags, 1, port, program)
    while file and not file.exists():
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    return both


@pytest.mark.nightly  # starts processes
def test_rank_that_waits_for_a_dead_rank_ends_with_an_error(tmp_path, npz):
    """Rank 1 has nothing to train, since there is one run. On another machine nothing else would end it."""
    flags = f"{FLAGS} --data-dir {npz} --epochs 100000 --output {tmp_path}/out"
    first, second = start_both_ranks(flags, tmp_path / "out/run-0/checkpoint.pt")
    first.kill()
    first.communicate()
    _, error = second.communicate(timeout=20)
    assert (second.returncode, error) == (1, "error: rank 1: another process has ended before its runs had\n")


def in_each_rank(code):
    """Return the arguments of Python for the command ``train`` after ``code``, which can use ``patch``."""
    start = "import sys; from pytest import MonkeyPatch; from tests import helpers; patch = MonkeyPatch()"
    return "-c", f"{start}\n{code}\nfrom cifar_fast.train import main; sys.exit(main())"


COUNT_THREADS_AT_THE_END = """
import sys
from pathlib import Path
from torch import distributed
from cifar_fast.train import main
destroy = distributed.destroy_process_group
def destroy_and_count():
    destroy()
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print("gloo threads:", sum("gloo" in name for name in names))
distributed.destroy_process_group = destroy_and_count
sys.exit(main())
"""


@pytest.mark.nightly  # starts processes
def test_no_thread_outlives_the_process_group(tmp_path, npz):
    """One in ten endings aborted the process, since a thread freed a tensor while Python ended."""
    flags = f"{FLAGS} --data-dir {npz} --runs 2 --output {tmp_path}/out"
    both = start_both_ranks(flags, program=("-c", COUNT_THREADS_AT_THE_END))
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [output.splitlines()[-1] for output in outputs] == ["gloo threads: 0"] * 2


@pytest.mark.nightly  # starts processes
@pytest.mark.parametrize(("seeds", "finished"), [([4, 6], [3, 5]), ([5], [3, 4, 6])])
def test_run_that_diverges_on_a_rank_costs_no_other(tmp_path, npz, tiny, no_curves, seeds, finished):
    """Rank 1 has the seeds 4 and 6. The last seed that has finished was on rank 0 or on rank 1."""
    flags = f"{FLAGS} --epochs 2 --data-dir {npz} --runs 4 --output {tmp_path}/out"
    both = start_both_ranks(flags, program=in_each_rank(f"helpers.diverge(patch, *{seeds})"))
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [1, 0] and errors[1] == ""
    told = [f"error: run {seed - 3} of 4, seed {seed}: the loss is not finite at step 1 " for seed in seeds]
    assert all(map(str.startswith, errors[0].splitlines(), told)) and errors[0].count("\n") == len(seeds)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == finished
    assert [run["seed"] for run in summary["diverged"]] == seeds
    assert files_in(tmp_path / "out") == files_of(4, diverged=[seed - 3 for seed in seeds])
    alone = fit(Recipe(epochs=2, batch_size=16, widths=(4, 8)), tiny, seed=finished[-1], **HOW)
    saved = torch.load(tmp_path / "out/model.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in alone.state_dict.items())
    again = start_both_ranks(f"--resume {tmp_path}/out")
    assert [process.communicate(timeout=60)[1] for process in again] == errors, "rank 0 alone names them"


@pytest.mark.nightly  # starts processes
def test_run_that_fails_on_a_rank_costs_no_other(tmp_path, npz, no_curves):
    flags = f"{FLAGS} --epochs 2 --data-dir {npz} --runs 3 --output {tmp_path}/out"
    no_memory = "patch.setattr('cifar_fast.backends.eager.Eager.reset', lambda *arguments: [].pop())"
    program = in_each_rank(f"import os\nif os.environ['RANK'] == '1': {no_memory}")
    both = start_both_ranks(flags, program=program)
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [1, 0], errors
    assert errors[0].startswith("error: rank 1: the eager backend cannot be set up here (IndexError: pop from empty")
    assert errors[0].count("\n") == 1
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [3, 5] and summary["missing"] == [{"run": 1, "seed": 4}]
    assert main(["--resume", f"{tmp_path}/out"]) == 0


@pytest.mark.nightly  # starts processes
def test_rank_0_writes_what_has_ended_when_another_rank_dies(tmp_path, npz):
    flags = f"{FLAGS} --data-dir {npz} --runs 2 --output {tmp_path}/out"
    first, second = start_both_ranks(flags, tmp_path / "out/run-1/checkpoint.pt")
    second.send_signal(signal.SIGSTOP)
    assert any(line.startswith("epoch 30") for line in first.stdout)
    time.sleep(1)
    second.kill()
    _, error = first.communicate(timeout=20)
    second.communicate()
    assert (first.returncode, error) == (1, "error: rank 0: another process has ended before its runs had\n")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert [run["seed"] for run in summary["runs"]] == [3] and summary["missing"] == [{"run": 1, "seed": 4}]
    assert load_model(tmp_path / "out")


@pytest.mark.nightly  # starts processes
def test_signal_ends_a_rank_that_waits(tmp_path, npz):
    flags = f"{FLAGS} --data-dir {npz} --runs 2 --output {tmp_path}/out"
    first, second = start_both_ranks(flags, tmp_path / "out/run-1/checkpoint.pt")
    second.send_signal(signal.SIGSTOP)
    assert any(line.startswith("epoch 30") for line in first.stdout)
    time.sleep(1)
    first.send_signal(signal.SIGINT)
    _, error = first.communicate(timeout=20)
    second.kill()
    second.communicate()
    hint = f"interrupted; to resume: cifar-fast train --resume {tmp_path}/out"
    assert (first.returncode, error.splitlines()[1:]) == (130, [hint])


@pytest.mark.slow  # starts processes
def test_ranks_with_other_data_are_an_error(tmp_path, npz):
    """Two machines may have different files at one path."""
    other = save_npz(tmp_path / "other.npz", small_dataset(train=32, test=16, seed=1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"{FLAGS} --runs 2 --output {tmp_path}/out --data-dir"
    both = start_rank(f"{flags} {npz}", 0, port), start_rank(f"{flags} {other}", 1, port)
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2] and errors[1] == ""
    assert errors[0].startswith(
        "error: the images, labels, classes or variants of rank 1 differ from those of rank 0; "
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(seed=7), "seed is 3 on rank 0, and 7 on rank 1"),
        (dict(runs=4), "runs is 2 on rank 0, and 4 on rank 1"),
        (dict(recipe=Recipe(epochs=31, batch_size=16, widths=(4, 8))), "epochs is 30 on rank 0, and 31 on rank 1"),
    ],
)
def test_ranks_with_other_options_are_an_error(tiny, monkeypatch, changes, words):
    def gather(world, value, waiting=None):
        configs, content = value if isinstance(value, tuple) else (None, None)
        return [value, ([configs[0].replace(**changes)], content) if configs else value]

    monkeypatch.setattr(World, "gather", gather)
    training = Training(TrainConfig(recipe=RECIPE, backend="eager", device="cpu", dtype="float32", seed=3, runs=2))
    training.prepare(tiny)
    with pytest.raises(InputError, match=words):
        train_all([training], World(0, 2))


def test_more_processes_than_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = BackendConfig(("eager",), torch.device("cuda"), torch.float32, torch.channels_last, "")
    assert local_device(config, 8, 1, "auto").device == torch.device("cuda", 1)
    assert local_device(config, 8, 1, "cuda:0") is config and local_device(config, 1, 0, "auto") is config
    with pytest.raises(InputError, match="more processes than GPUs, 2 on this machine; start at most 2 processes"):
        local_device(config, 8, 2, "cuda")


@pytest.mark.gpu
@pytest.mark.nightly  # starts processes
def test_each_process_uses_its_own_gpu(tmp_path, npz):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    flags = f"{FLAGS} --data-dir {npz} --epochs 2 --runs 3 --device cuda"
    assert main(f"{flags} --output {tmp_path}/one".split()) == 0
    assert ended(torchrun(f"{flags} --output {tmp_path}/two"))[0] == 0
    assert json.loads((tmp_path / "two/summary.json").read_text())["environment"]["device"] == "cuda:0"
    assert contents(tmp_path / "two")[1] == contents(tmp_path / "one")[1]


@pytest.mark.nightly  # starts processes that emulate the kernels
def test_two_processes_on_a_simulator_of_two_gpus(tmp_path, npz, simulator):
    def on_gpus(log):
        return [simulator, "--values", "--devices", "2", "--log", str(tmp_path / log), "-m", "cifar_fast.train"]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    flags = f"{FLAGS} --device auto --data-dir {npz} --epochs 2 --runs 2 --output {tmp_path}"
    both = [start_rank(f"{flags}/two", rank, port, on_gpus(f"{rank}.log")) for rank in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.communicate() for process in both]
    assert [e["device"] for e in json.loads((tmp_path / "two/run-1/result.json").read_text())["environments"]] == [
        "cuda:1"
    ]
    done = subprocess.run(
        [sys.executable, *on_gpus("one.log"), *f"{flags}/one".split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two")[1] == contents(tmp_path / "one")[1]


LEFT_BEHIND = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def alone(flags, program="train", **variables):
    """Start ``cifar-fast`` with the environment ``variables`` of a launch whose other processes do not exist."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | LEFT_BEHIND | {"MASTER_PORT": port} | variables
    settings = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([sys.executable, "-m", "cifar_fast", program, *flags.split()], **settings)


@pytest.mark.slow  # starts a process
@pytest.mark.parametrize("rank", ["0", "1"])
def test_wait_for_missing_ranks_has_a_line_and_ends_by_ctrl_c(tmp_path, npz, rank):
    process = alone(f"{FLAGS} --data-dir {npz} --output {tmp_path}/out", RANK=rank)
    line = process.stdout.readline()
    assert line.startswith(f"rank {rank} waits for the other ranks of 2 at 127.0.0.1:") and "unset them" in line
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    ours = [line for line in error.splitlines() if not line.startswith("[W")]  # torch warns on rank 1
    assert (process.returncode, ours) == (130, ["interrupted before there was anything to resume"])
    assert not list(tmp_path.iterdir())


def test_line_about_missing_ranks_comes_again(monkeypatch):
    monkeypatch.setattr(distributed, "REMIND_SECONDS", 0.1)
    lines = []
    with lines_to(lines.append):
        distributed._in_thread(lambda: time.sleep(1.5), "waiting")
    assert set(lines) == {"waiting"} and 3 <= len(lines) <= 6


@pytest.mark.parametrize("rank", ["0", "1"])
def test_flags_are_checked_without_the_other_ranks(tmp_path, npz, monkeypatch, capfd, rank):
    """No command here may wait, even if a process that torchrun started calls it."""
    for name, value in (LEFT_BEHIND | {"RANK": rank}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.World, "process_group", lambda world: pytest.fail("waits"))
    assert main(["--print-recipe"]) == 0
    assert Recipe.from_json(capfd.readouterr().out) == Recipe()
    for help_of in ("train", "sweep"):
        with pytest.raises(SystemExit, match="0"):
            command([help_of, "--help"])
        assert capfd.readouterr().out.startswith("usage: ")
    (tmp_path / "spec.toml").write_text(SPEC.format(data=npz, output=tmp_path / "sweep", epochs=2))
    assert command(["sweep", f"{tmp_path}/spec.toml", "--dry-run"]) == 0
    assert "run 0 of baseline, seed 0: to do" in capfd.readouterr().out
    for wrong, words in {
        "train --nonsense": "unrecognized arguments",
        "train --runs 0": "--runs must be at least 1",
        "train --epochs 0": "--epochs must be at least 1",
        "train --recipe none.json": "cannot read the recipe",
        f"train --resume {tmp_path}/none": "nothing to resume",
        "train --dataset npz": "needs --data-dir",
        "train --profile out": "--profile runs in one process",
        "train --runs 2 --init-seed 1 --order-seed 1 --augment-seed 1": "the runs would be equal",
        "sweep none.toml": "cannot read the sweep",
        "report none": "holds no training.json",
    }.items():
        assert command(wrong.split()) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (dict(RANK="one"), "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers"),
        (dict(MASTER_PORT="http"), "RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers"),
        (dict(MASTER_PORT="70000"), "MASTER_PORT must be from 0 to 65535, not 70000"),
        (dict(RANK="2"), "RANK is 2 and WORLD_SIZE is 2"),
        (dict(RANK="-1"), "RANK is -1 and WORLD_SIZE is 2"),
        (dict(WORLD_SIZE="0"), "RANK is 0 and WORLD_SIZE is 0"),
    ],
)
def test_impossible_variables_of_torchrun_are_one_error_line(npz, monkeypatch, capfd, variables, words):
    for name, value in (LEFT_BEHIND | variables).items():
        monkeypatch.setenv(name, value)
    assert main(f"{FLAGS} --data-dir {npz}".split()) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1
    assert main(["--print-recipe"]) == 0


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (dict(SLURM_NTASKS="4"), "SLURM_NTASKS is 4, but torchrun's RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are"),
        (dict(OMPI_COMM_WORLD_SIZE="2"), "OMPI_COMM_WORLD_SIZE is 2, but "),
        (dict(RANK="0", WORLD_SIZE="2"), "WORLD_SIZE is 2, but torchrun's MASTER_ADDR, MASTER_PORT are"),
        (dict(SLURM_NTASKS="1"), None),
        (dict(SLURM_NTASKS="several"), None),
        (LEFT_BEHIND | dict(WORLD_SIZE="1", SLURM_NTASKS="4"), None),
    ],
)
def test_processes_that_will_each_train_everything_say_so(tmp_path, monkeypatch, capfd, variables, line):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(f"--dataset npz --data-dir {tmp_path}/none.npz --output {tmp_path}/out".split()) == 2
    lines = capfd.readouterr().out.splitlines()
    assert [one for one in lines if "trains everything" in one] == lines and len(lines) == (line is not None)
    assert not line or lines[0].startswith(line)
