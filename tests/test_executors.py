"""Executors: all give the same records, whatever dies; and each says what it cannot do."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from purebench import UsageError
from purebench.cli import FAILED, OK, USAGE, main
from purebench.config import RunConfig, read_sweep
from purebench.executors.pool import Pool
from purebench.progress import Progress
from purebench.sweep import Order, Sweep, Task, fulfil

from .faults import alive

ray = pytest.importorskip("ray", reason="pip install 'purebench[ray]'")
submitit = pytest.importorskip("submitit", reason="pip install 'purebench[slurm]'")
ROOT = Path(__file__).parent.parent
fork = multiprocessing.get_context("fork")  # torch is there at once

TINY = """
dataset: shapes
attack: [badnets]
defense: [none, prune]
target: 1
reactivate: false
set:
  shapes: {train_count: 200, test_count: 60}
  small_cnn: {width: 2}
  mnist_fast: {epochs: 1}
"""

PLUGINS = """\
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from purebench import ATTACKS, DEFENSES, AttackContext, BackdooredModel, Defense, DefenseContext
from purebench import PoisoningAttack


@DEFENSES.register("gated")
@dataclass(frozen=True)
class Gated(Defense):
    paper: ClassVar[str] = "nobody"

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        handle, _ = tempfile.mkstemp(prefix="waits-", dir=".")
        os.write(handle, str(os.getpid()).encode())
        while not Path("open").exists():
            time.sleep(0.05)
        return model


@DEFENSES.register("exits")
@dataclass(frozen=True)
class Exits(Defense):
    paper: ClassVar[str] = "nobody"

    def purify(self, model: nn.Module, ctx: DefenseContext) -> nn.Module:
        os._exit(9)


@ATTACKS.register("broken")
@dataclass(frozen=True)
class Broken(PoisoningAttack):
    paper: ClassVar[str] = "nobody"

    def make_trigger(self, shape: torch.Size, rng: torch.Generator) -> nn.Module:
        return nn.Identity()

    def run(self, ctx: AttackContext) -> BackdooredModel:
        with open("tries", "a") as file:
            file.write("x")
        raise RuntimeError("no luck")
"""

# What was asked for goes to a queue, a line a job; what came of it is read from a list.
SACCT = """\
#!/bin/sh
echo "JobID|State"
cat "$SPOOL/ended"
"""
SBATCH = """\
#!/bin/sh
echo "$1" >> "$SPOOL/queue"
echo "Submitted batch job $(wc -l < "$SPOOL/queue")"
"""


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("results/records/*/*.json"))


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by their names, without what they were measured on and what that took."""
    found = {path.name: json.loads(path.read_text()) for path in records(folder)}
    return {
        name: {key: value for key, value in content.items() if key not in ("cost", "machine")}
        for name, content in found.items()
    }


def states(paths: list[Path]) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A defense that waits for a file, one that ends its process, an attack that fails."""
    file = tmp_path_factory.mktemp("plugins") / "plugins.py"
    file.write_text(PLUGINS)
    return str(file)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a sweep of four cells."""
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(TINY)
    return tmp_path


def sweep(*words: str) -> int:
    return main(["sweep", "sweep.yaml", "--quiet", *words])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of the sweep, by the serial executor."""
    folder = tmp_path_factory.mktemp("serial")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("sweep.yaml").write_text(TINY)
        assert sweep() == OK
    found = results(folder)
    assert len(found) == 4
    assert all(record["status"] == "ok" for record in found.values())
    return found


def test_a_sweep_that_is_killed_twenty_times_ends_with_the_same_records(folder: Path) -> None:
    """Each time a random moment after none, one or two more cells."""
    lists = "seeds: [0, 1, 2]\nbenign_fraction: [0.1, 0.2, 0.3]\n"
    more = TINY.replace("prune]", "prune, clp, ep]")
    Path("sweep.yaml").write_text(more + lists)
    rng = random.Random(0)
    for _ in range(20):
        target = len(records(folder)) + rng.randrange(3)
        process = fork.Process(target=sweep)
        process.start()
        while len(records(folder)) < target and process.is_alive():
            time.sleep(0.002)
        time.sleep(0.03 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    before = states(records(folder))
    assert 0 < len(before) < 72
    assert sweep() == OK
    after = states(records(folder))
    assert {name: after[name] for name in before} == before
    assert len(after) == 72
    disturbed = results(folder)
    Path("results").rename("disturbed")
    assert sweep() == OK
    assert results(folder) == disturbed


def test_a_pool_gives_the_same_records(folder: Path, expected: dict[str, Any]) -> None:
    assert sweep("--jobs", "2") == OK
    assert results(folder) == expected


def test_gpus_have_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def places(pool: Pool, device: str) -> list[str]:
        plan = SimpleNamespace(device=torch.device(device), config=RunConfig(device="auto"))
        return pool._places(SimpleNamespace(plans=[plan]))  # type: ignore[arg-type]

    assert places(Pool(jobs=3), "cpu") == ["auto"] * 3
    assert places(Pool(), "cuda") == ["cuda:0", "cuda:1"]
    assert places(Pool(gpu_slots=2), "cuda") == ["cuda:0", "cuda:1"] * 2
    assert places(Pool(jobs=3, gpu_slots=2), "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert places(Pool(jobs=3), "cuda") == ["cuda:0", "cuda:1", "cuda:0"]
    assert places(Pool(jobs=9, gpu_slots=2), "cuda:1") == ["cuda:1"] * 2
    with pytest.raises(UsageError, match="--gpu-slots is for GPUs, and this runs on cpu"):
        places(Pool(gpu_slots=2), "cpu")


# Slurm: sbatch and sacct are scripts, and jobs are done in the order in which they were given.


def serve(spool: Path) -> None:
    """Do what lies in the queue, one job after another."""
    from submitit.core.submission import process_job

    for done in itertools.count(1):
        while not (queue := spool / "queue").exists() or queue.read_text().count("\n") < done:
            time.sleep(0.02)
        file = Path(queue.read_text().split("\n")[done - 1])
        text = file.read_text()
        (spool / f"{done}.sh").write_text(text)
        array = re.search(r"--array=0-(\d+)", text)
        for number in range(int(array[1]) + 1 if array else 1):
            os.environ["SLURM_JOB_ID"] = str(done)
            if array:
                os.environ |= {"SLURM_ARRAY_JOB_ID": str(done), "SLURM_ARRAY_TASK_ID": str(number)}
            job = fork.Process(target=process_job, args=(file.parent,))
            job.start()
            job.join()
            os.environ.pop("SLURM_ARRAY_JOB_ID", None)
            name = f"{done}_{number}" if array else f"{done}"
            with (spool / "ended").open("a") as ended:
                print(name, "OUT_OF_MEMORY" if job.exitcode else "COMPLETED", sep="|", file=ended)


@pytest.fixture
def spool(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a Slurm of one machine: the scripts that it was given."""
    spool = folder / "spool"
    spool.mkdir()
    (spool / "ended").touch()
    programs = {"sbatch": SBATCH, "srun": "", "scancel": "", "sacct": SACCT}
    for name, text in programs.items():
        (spool / name).write_text(text)
        (spool / name).chmod(0o755)
    monkeypatch.setenv("SPOOL", str(spool))
    monkeypatch.setenv("PATH", f"{spool}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setattr("purebench.executors.slurm.POLL_SECONDS", 0.1)
    watcher = type(submitit.SlurmJob.watcher)(delay_s=0.1)  # that remembers no job of another test
    monkeypatch.setattr(submitit.SlurmJob, "watcher", watcher)
    monkeypatch.setattr(
        submitit.SlurmJob, "_results_timeout_s", 0.1
    )  # no slow folder is waited for
    daemon = fork.Process(target=serve, args=(spool,))
    daemon.start()
    yield spool
    daemon.kill()
    daemon.join()


SLURM = ("--executor", "slurm", "--slurm", "time=30", "partition=gpu", "gpus_per_node=1")


def test_slurm_gives_the_same_records(folder: Path, spool: Path, expected: dict[str, Any]) -> None:
    assert sweep(*SLURM, "--jobs", "1") == OK
    assert results(folder) == expected
    attacks, defenses = ((spool / f"{number}.sh").read_text() for number in (1, 2))
    for script in (attacks, defenses):
        assert "#SBATCH --array=0-1%1\n" in script
        assert "#SBATCH --partition=gpu\n" in script
        assert "#SBATCH --gpus-per-node=1\n" in script
        assert "#SBATCH --time=30\n" in script
        assert "-m submitit.core._submit" in script
    assert "--dependency" not in attacks
    assert "#SBATCH --dependency=afterany:1\n" in defenses
    before = states(records(folder))
    assert sweep(*SLURM) == OK
    assert not (spool / "3.sh").exists()
    assert states(records(folder)) == before


def test_an_attack_that_fails_is_tried_once(
    folder: Path, spool: Path, plugins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its attack task records all cells; the defense tasks then find no network, and leave them."""
    assert sweep(*SLURM, "--attack", "broken", "none", "--plugin", plugins) == FAILED
    assert len(Path("tries").read_text()) == 1
    assert "2 of 4 cells did not finish" in capsys.readouterr().err
    found = [record for record in results(folder).values() if record["status"] == "failed"]
    assert {record["error"] for record in found} == {"RuntimeError: no luck"}


def test_what_slurm_loses_is_recorded(
    folder: Path, spool: Path, plugins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--attack", "none", "--defense", "exits", "prune", "--plugin", plugins)
    assert sweep(*SLURM, *words) == FAILED
    assert "1 of 2 cells did not finish" in capsys.readouterr().err
    found = {record["cell"]["defense"]["name"]: record for record in results(folder).values()}
    assert found["prune"]["status"] == "ok"
    assert found["exits"]["error"] == "Slurm job lost, its state OUT_OF_MEMORY"


MACHINE = {"num_cpus": 1, "include_dashboard": False}


def test_what_slurm_refuses_ends_the_sweep(spool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (spool / "sbatch").write_text("#!/bin/sh\necho invalid partition: gpu >&2\nexit 1\n")
    assert sweep(*SLURM) == USAGE
    error = capsys.readouterr().err
    assert "sbatch refuses: " in error
    assert "invalid partition: gpu" in error


def test_arrays_are_no_longer_than_slurm_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    from purebench.executors.slurm import _arrays

    def victim(count: int) -> Task:
        return Task("blend", 0, (0,), (Path("record"),) * count, "attack")

    monkeypatch.setattr("purebench.executors.slurm.ARRAY", 5)
    counts = [[len(task.records) for task in array] for array in _arrays(map(victim, [2, 3, 1, 9]))]
    assert counts == [[2, 3], [1], [9]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head with one CPU; tests add their second machine."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        cluster = Cluster(initialize_head=True, head_node_args=MACHINE)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def second(cluster: Any) -> Any:
    """Its second machine, with one CPU."""
    node = cluster.add_node(**MACHINE)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def on_ray(cluster: Any) -> tuple[str, ...]:
    return ("--executor", "ray", "--address", cluster.address)


def waiting(folder: Path) -> list[int]:
    """The processes that stand at the gate, or have stood there."""
    return [int(text) for file in folder.glob("waits-*") if (text := file.read_text())]


def test_ray_gives_the_same_records(
    folder: Path, cluster: Any, second: Any, expected: dict[str, Any]
) -> None:
    assert sweep(*on_ray(cluster)) == OK
    assert results(folder) == expected
    assert not ray.is_initialized()


GATED = ("--defense", "none", "gated", "--plugin")


def test_a_machine_that_is_lost_costs_what_it_was_doing(
    folder: Path, cluster: Any, second: Any, plugins: str
) -> None:
    """Both machines stand at the gate when one of them dies."""
    before = {}

    def kill() -> None:
        while len(waiting(folder)) < 2:
            time.sleep(0.02)
        before.update(states(records(folder)))
        cluster.remove_node(second, allow_graceful=False)
        while all(alive(process) for process in waiting(folder)):
            time.sleep(0.02)  # a worker outlives its machine by a moment
        (folder / "open").touch()

    killer = Thread(target=kill)
    killer.start()
    assert sweep(*on_ray(cluster), *GATED, plugins) == OK
    killer.join()
    assert len(waiting(folder)) == 3
    after = states(records(folder))
    assert (len(before), len(after)) == (2, 4)
    assert {name: after[name] for name in before} == before
    assert {record["status"] for record in results(folder).values()} == {"ok"}


def test_a_sweep_whose_driver_is_killed_goes_on_from_its_records(
    folder: Path, cluster: Any, plugins: str
) -> None:
    words = ("sweep", "sweep.yaml", "--quiet", *on_ray(cluster), *GATED, plugins)
    driver = subprocess.Popen([sys.executable, ROOT / "bench.py", *words])
    while not waiting(folder):
        time.sleep(0.02)
        assert driver.poll() is None
    before = states(records(folder))
    driver.kill()
    driver.wait()
    (folder / "open").touch()
    assert main([*words]) == OK
    after = states(records(folder))
    assert 0 < len(before) < len(after) == 4
    assert {name: after[name] for name in before} == before


def test_a_cell_that_kills_its_worker_costs_itself_alone(
    folder: Path, cluster: Any, plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("purebench.executors.ray.RETRIES", 0)
    words = ("--attack", "none", "--defense", "exits", "prune", "--plugin", plugins)
    assert sweep(*on_ray(cluster), *words) == FAILED
    found = {record["cell"]["defense"]["name"]: record for record in results(folder).values()}
    assert found["prune"]["status"] == "ok"
    assert found["exits"]["error"] == "Ray gave it up: WorkerCrashedError"


def test_what_keeps_workers_from_working_ends_the_sweep(
    folder: Path, cluster: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Sweep.order

    def elsewhere(self: Sweep, task: Task) -> Order:
        return replace(order(self, task), mark="of another folder")

    monkeypatch.setattr(Sweep, "order", elsewhere)
    assert sweep(*on_ray(cluster)) == USAGE
    assert "is not the folder that the sweep was started in" in capsys.readouterr().err


def test_a_worker_knows_the_folder_and_the_cells(folder: Path) -> None:
    """A machine with another folder, or with other code or data, refuses."""
    sweep = Sweep.of(read_sweep("sweep.yaml", {}), Progress(quiet=True))
    order = sweep.order(sweep.tasks[0])
    task = replace(order.task, records=(*order.task.records, Path("unknown.json")))
    with pytest.raises(UsageError, match=r"does not know unknown\.json: its code or data"):
        fulfil(replace(order, task=task))
    for wrong in (replace(order, mark="another"), replace(order, folder="/nowhere")):
        with pytest.raises(UsageError, match="is not the folder that the sweep was started in"):
            fulfil(wrong)
    assert not records(folder)
    assert fulfil(order) == [path.relative_to(folder) for path in records(folder)]


def test_ray_that_does_not_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = Event()
    monkeypatch.setattr("purebench.executors.ray.PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(ray, "init", lambda **_: hung.wait())
    assert sweep("--executor", "ray", "--address", "far:6379") == USAGE
    hung.set()
    assert "no answer from Ray at 'far:6379' within 0 s" in capsys.readouterr().err

    def refuse(**_: object) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setattr("purebench.executors.ray.PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(ray, "init", refuse)
    assert sweep("--executor", "ray", "--address", "far:6379") == USAGE
    assert "no Ray at 'far:6379': nobody there" in capsys.readouterr().err
    assert not records(folder)


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_a_missing_extra_is_named(
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = {"ray": "ray", "slurm": "submitit"}[name]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"purebench.executors.{name}", raising=False)
    assert sweep("--executor", name) == USAGE
    told = f'executor {name} needs {package}, which is not installed: pip install -e ".[{name}]"'
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--executor sun", "invalid choice: 'sun'"),
        ("--executor serial --jobs 2", "--jobs is nothing to executor serial"),
        ("--jobs 2 --address auto", "--address is nothing to executor pool"),
        ("--executor ray --slurm time=3", "--slurm is nothing to executor ray"),
        ("--gpu-slots 2", "--gpu-slots is nothing to executor serial"),
        ("--executor pool --gpu-slots 0", "--gpu-slots must be at least 1, got 0"),
        ("--executor pool --jobs 1 --gpu-slots 2", "--gpu-slots is for GPUs"),
        ("--executor slurm", "needs --slurm time=MINUTES"),
        ("--executor slurm --slurm time", "--slurm 'time' must have the form KEY=VALUE"),
        ("--executor slurm --slurm time=long", "needs --slurm time=MINUTES"),
        ("--executor slurm --slurm time=3", "no srun here"),
    ],
)
def test_what_an_executor_cannot_be(
    words: str,
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    assert sweep(*words.split(), "--device", "cpu") == USAGE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not records(folder)


def test_slurm_names_an_option_that_sbatch_does_not_have(
    spool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep("--executor", "slurm", "--slurm", "time=3", "partion=gpu") == USAGE
    assert "--slurm: Unavailable parameter(s): ['partion']" in capsys.readouterr().err
