"""The term `lowpass` measures what `evaluate --all` does, and asks for no more than it is told."""

import threading

import pytest
import torch

from eqvae.methods.lowpass import Lowpass
from eqvae.methods.protocol import Drawn, Encoded
from eqvae.metrics.spectrum import SpectrumSums, high_frequency_excess_db, images_on_latent_grid
from eqvae.runtime.processes import ALONE, Processes


def value(autoencoder, x, z, excess_db: float, processes: Processes = ALONE) -> torch.Tensor:
    encoded = Encoded(
        autoencoder=autoencoder, x=x, posterior=autoencoder.encode(x), z=z, drawn=Drawn(), part=None,
        processes=processes,
    )  # fmt: skip
    return Lowpass(excess_db=excess_db).value(encoded)


@pytest.mark.parametrize("size_px", [(64, 64), (64, 96)])
def test_it_is_the_excess_of_the_evaluation(small_autoencoder, size_px):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((3, 3, *size_px), generator=generator) * 2 - 1
    z = torch.randn((3, 4, size_px[0] // 4, size_px[1] // 4), generator=generator) * 5.0 + 1.0
    latents, images = SpectrumSums(), SpectrumSums()
    latents.add(z)
    images.add(images_on_latent_grid(x, 4))
    expected = high_frequency_excess_db(latents.spectrum(), images.spectrum())
    found = value(small_autoencoder, x, z, expected - 2.0)
    torch.testing.assert_close(found, torch.full((3,), 2.0), rtol=1e-3, atol=1e-3)
    assert value(small_autoencoder, x, z, expected + 1.0).tolist() == [0.0] * 3  # no richer than wanted


def test_two_processes_see_one_spectrum(small_autoencoder, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4, 3, 64, 64), generator=generator) * 2 - 1
    z = torch.randn((4, 4, 16, 16), generator=generator) * torch.tensor([1.0, 1.0, 4.0, 4.0])[:, None, None, None]
    barrier, table = threading.Barrier(2), [torch.zeros(())] * 2

    def sum_over_threads(own: torch.Tensor) -> torch.Tensor:
        table[int(threading.current_thread().name)] = own
        barrier.wait(60)
        total = table[0] + table[1]
        barrier.wait(60)
        return total

    monkeypatch.setattr("eqvae.methods.lowpass.sum_with_gradient", sum_over_threads)
    found: dict[int, torch.Tensor] = {}

    def part(rank: int) -> None:
        rows, processes = slice(2 * rank, 2 * rank + 2), Processes(rank=rank, count=2, device=torch.device("cpu"))
        found[rank] = value(small_autoencoder, x[rows], z[rows], -20.0, processes)

    threads = [threading.Thread(target=part, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    torch.testing.assert_close(torch.cat([found[0], found[1]]), value(small_autoencoder, x, z, -20.0))


def test_its_gradient_takes_high_frequencies_away(small_autoencoder):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, 3, 64, 64), generator=generator) * 2 - 1
    z = torch.randn((2, 4, 16, 16), generator=generator).requires_grad_()
    optimizer, before = torch.optim.Adam([z], 0.05), None
    for _ in range(30):
        loss = value(small_autoencoder, x, z, -20.0).mean()
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 3.0
