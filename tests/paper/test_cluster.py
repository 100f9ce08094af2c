"""A plan on a Ray cluster of two machines: interrupted, a machine lost in the middle of a run, and the same results."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eqvae.artifacts.files import read_json, read_tensors, write_json
from eqvae.cli import run
from eqvae.errors import Interrupted, UserError
from eqvae.paper.cluster import execute_on_cluster
from eqvae.paper.execution import perform
from eqvae.paper.plan import Plan
from eqvae.paper.setting import Setting
from eqvae.paper.tables import table8
from eqvae.runs.reproduce import ReproduceConfig, reproduce

SAID, HOLD, FAIL = "said", "hold", "fail"
CLOCKS = ("_sec", "share_of_peak")


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where workers write what they do, and read what they are to do."""
    return tmp_path_factory.mktemp("notes")


def prepare(notes: Path) -> Callable[[], None]:
    """Make what each worker does first: it measures as this process does, and says which runs it does."""
    shared_file = Path(__file__).with_name("conftest.py")

    def set_up() -> None:
        import importlib.util
        import os
        import time

        import pytest
        import ray
        import torch

        import eqvae.paper.cluster  # noqa: F401 - so that all is there to be patched
        from eqvae.errors import UserError
        from eqvae.paper import execution
        from eqvae.training.loop import Loop

        specification = importlib.util.spec_from_file_location("smallest_scale", shared_file)
        shared = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(shared)
        monkeypatch = pytest.MonkeyPatch()
        shared.measure_at_once(monkeypatch)
        shared.narrow_generators(monkeypatch)
        torch.set_num_threads(1)
        perform, write_checkpoint = execution.perform, Loop.write_checkpoint
        doing: list[str] = []

        def say(*words):
            with (notes / "said").open("a") as file:
                file.write(" ".join(words) + "\n")

        def counted(planned):
            say("begun", planned.name)
            doing[:] = [planned.name]
            if (notes / "fail").exists():
                raise UserError("the disk is full", "Make room")
            perform(planned)
            say("ended", planned.name)

        def held(loop):
            """Stay in the middle of a run until somebody stops it, or the machine is lost."""
            write_checkpoint(loop)
            if loop.title == "train":
                try:
                    (notes / "hold").unlink()
                except FileNotFoundError:
                    return
                say("stopped", *doing)
                say("held", ray.get_runtime_context().get_node_id())
                deadline_sec = time.monotonic() + 60
                while not loop.stop and time.monotonic() < deadline_sec:
                    time.sleep(0.05)

        execution.perform, Loop.write_checkpoint = counted, held
        os.environ["HF_HUB_OFFLINE"] = "1"

    return set_up


def said(notes: Path, word: str) -> list[str]:
    lines = (notes / SAID).read_text().splitlines() if (notes / SAID).exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == word]


@pytest.fixture(scope="module")
def cluster(notes: Path) -> Iterator[Any]:
    """A head that does no runs, and two machines, which share this one's disk."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from ray.cluster_utils import Cluster

        machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(2):
            machines.add_node(num_cpus=1)
        hook = {"worker_process_setup_hook": prepare(notes)}
        ray.init(address=machines.address, logging_level="warning", runtime_env=hook)
        yield machines
        ray.shutdown()
        machines.shutdown()


@pytest.fixture
def small(setting: Setting) -> Setting:
    """One strength, one seed, and a checkpoint in the middle of each training."""
    training = {family: replace(config, checkpoint_every=2) for family, config in setting.training.items()}
    return replace(setting, seeds=(0,), strengths=(0.5,), training=training)


def then(notes: Path, act: Callable[[str], object]) -> threading.Thread:
    """Have a training held in its middle, and do something there, given the machine."""
    before = len(said(notes, "held"))
    (notes / HOLD).touch()

    def watch() -> None:
        deadline_sec = time.monotonic() + 90
        while len(said(notes, "held")) == before and time.monotonic() < deadline_sec:
            time.sleep(0.05)
        act(said(notes, "held")[-1])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def figures(root: Path, name: str) -> dict[str, Any]:
    return {key: value for key, value in read_json(root / name / "metrics.json").items() if not key.endswith(CLOCKS)}


@pytest.mark.slow
def test_a_plan_survives_its_machines(cluster, notes: Path, small: Setting, tmp_path: Path, capfd):
    def reproduce_on(address: str | None, root: Path) -> None:
        config = ReproduceConfig(items=("table8",), out=root, device="cpu", scale="tiny", cluster=address)
        reproduce(config, {"tiny": small})

    names = [planned.name for planned in Plan.of(table8(small).runs).runs]
    stopping = then(notes, lambda machine: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM; the same command goes on"):
        reproduce_on(cluster.address, small.root)
    stopping.join()
    (stopped,) = said(notes, "stopped")
    assert stopped in set(said(notes, "begun")) - set(said(notes, "ended"))  # the other machine's run may be another
    assert not (small.root / stopped / "metrics.json").exists()
    assert '"step": 3' in read_tensors(small.root / stopped / "checkpoint.safetensors")[1]["numbers"]

    def lose(machine: str) -> None:
        (node,) = [node for node in cluster.worker_nodes if node.node_id == machine]
        cluster.remove_node(node, allow_graceful=False)

    losing = then(notes, lose)
    reproduce_on(cluster.address, small.root)
    losing.join()
    assert len(cluster.worker_nodes) == 1
    assert Counter(said(notes, "ended")) == Counter(names)  # none was done twice to the end
    assert max(Counter(said(notes, "begun")).values()) in (2, 3)

    torch.set_num_threads(1)
    reproduce_on(None, tmp_path / "alone")
    for name in names:
        assert figures(small.root, name) == figures(tmp_path / "alone", name)
    one, other = (read_json(root / "table8.json")["rows"] for root in (small.root, tmp_path / "alone"))
    assert one == other
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_failure_names_the_run_and_ends_the_plan(cluster, notes: Path, small: Setting):
    before = Counter(said(notes, "begun"))
    (notes / FAIL).touch()
    config = ReproduceConfig(items=("table8",), out=small.root, device="cpu", scale="tiny", cluster="auto")
    with pytest.raises(UserError, match=r"^run '.*': the disk is full. Make room$"):
        reproduce(config, {"tiny": small})
    (notes / FAIL).unlink()
    assert sum((Counter(said(notes, "begun")) - before).values()) <= 4  # those without needs
    more = replace(config, processes_per_run=2)
    with pytest.raises(UserError, match="a run takes 2 CPUs, and no machine of the cluster has more than 1"):
        reproduce(more, {"tiny": small})


@pytest.mark.slow
def test_processes_share_a_run(cluster, notes: Path, small: Setting, tmp_path: Path):
    (encoding,) = [planned for planned in Plan.of(table8(small).runs).runs if planned.name == "latents/tiny-kl-f2"]
    cluster.add_node(num_cpus=2)
    write_json(small.root / "config.json", {})
    done = execute_on_cluster(Plan.of([encoding]), small.root, address="auto", device="cpu", processes_per_run=2)
    assert done == [encoding.name]
    perform(replace(encoding, config=replace(encoding.config, out=tmp_path / "alone")))
    assert read_json(encoding.folder / "environment.json")["num_processes"] == 2
    shards = sorted(path.name for path in (tmp_path / "alone").glob("*.safetensors"))
    assert shards
    for shard in shards:
        assert (encoding.folder / shard).read_bytes() == (tmp_path / "alone" / shard).read_bytes()


@pytest.mark.parametrize(
    ("more", "what"),
    [(("--cluster", "auto", "--processes-per-run", "0"), "--processes-per-run is 0"),
     (("--processes-per-run", "2"), "--processes-per-run is of runs on a --cluster")],
)  # fmt: skip
def test_wrong_input_is_one_line(images: Path, tmp_path: Path, capsys, more: tuple[str, ...], what: str):
    arguments = ["rank", "untrained:tiny-kl-f2", "other=untrained:tiny-kl-f2", "--data", str(images)]
    arguments += ["--reference-data", str(images), "--out", str(tmp_path / "root"), *more]
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line
    assert not (tmp_path / "root").exists()


def test_without_ray(images: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    arguments = ["rank", "untrained:tiny-kl-f2", "other=untrained:tiny-kl-f2", "--data", str(images)]
    assert run([*arguments, "--reference-data", str(images), "--out", str(tmp_path / "root"), "--cluster", "auto"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "eqvae: --cluster needs Ray, which is not installed. pip install 'eqvae[ray]'"
