"""Two hosts: torchrun's rendezvous, gloo and the losses, over a network between two network namespaces."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eqvae.artifacts.files import read_journal, read_json
from eqvae.cli import run

ADDRESSES = ("10.231.77.1", "10.231.77.2")
TRAIN = ("--batch-size", 4, "--log-every", 1, "--watch-steps", 2, "--sample-every", 100, "--num-watch-samples", 4,
         "--precision", "fp32", "--device", "cpu", "--max-steps", 2)  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[tuple[str, str], ...]]:
    """Name and network interface of two hosts that see each other and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip, of iproute2")
    pairs = tuple((f"eqvae-{os.getpid()}-{side}", f"ve{os.getpid() % 100_000}{side}") for side in "ab")
    try:
        for name, _ in pairs:
            ip("netns", "add", name)
        ip("link", "add", pairs[0][1], "type", "veth", "peer", "name", pairs[1][1])
        for (name, interface), address in zip(pairs, ADDRESSES, strict=True):
            ip("link", "set", interface, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield pairs
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces may not be made here ({error.stderr.strip()})")
    finally:
        for name, _ in pairs:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_as_one(hosts, eight_images: Path, tmp_path: Path):
    flags = ("--image-size", 64, "--num-workers", 0, "--device", "cpu")
    encode = ("encode", "untrained:tiny-kl", "--data", eight_images, "--out", tmp_path / "latents", *flags)
    assert run([str(word) for word in encode]) == 0

    def train(out: str) -> list[str]:
        words = ("train", "dit-ti-4", "--latents", tmp_path / "latents", "--out", tmp_path / out, *TRAIN)
        return [str(word) for word in words]

    started = []
    for (name, interface), address in zip(hosts, ADDRESSES, strict=True):
        launcher = (
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "eqvae", "--local-addr", address,
            "--rdzv-conf", f"is_host={int(address == ADDRESSES[0])}", "-m", "eqvae",
        )  # fmt: skip
        started.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, *launcher, *train("two")],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": interface},
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert "".join(printed for printed, _ in said).count("generator in") == 1
    torch.set_num_threads(1)
    assert run(train("one")) == 0
    losses = [
        [record["loss"] for record in read_journal(tmp_path / out) if record["kind"] == "train"]
        for out in ("two", "one")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert read_json(tmp_path / "two" / "environment.json")["num_processes"] == 2
