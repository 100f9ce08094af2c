"""LPIPS: its weights' loading, and torchmetrics' own figure."""

import pytest
import torch

from eqvae.errors import UserError
from eqvae.networks.pretrained import Lpips, lpips_is_cached


def test_lpips_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    assert not lpips_is_cached()
    with pytest.raises(UserError, match=r"VGG16.*efficientnet-lite0"):
        Lpips()


@pytest.mark.slow
def test_lpips_reads_its_backbone_from_the_local_cache(tmp_path, monkeypatch):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import vgg16

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(vgg16().state_dict(), tmp_path / "checkpoints" / "vgg16-397923af.pth")
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", _load_without_digest(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _load_without_digest(tmp_path))
    assert lpips_is_cached()
    ours = Lpips()
    x, y = torch.rand(2, 3, 64, 64) * 2 - 1, (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_()
    distances = ours(x, y)
    theirs = LearnedPerceptualImagePatchSimilarity(net_type="vgg")
    assert distances.mean().item() == pytest.approx(theirs(x, y).item(), rel=1e-5)
    assert torch.allclose(ours(x, x), torch.zeros(2), atol=1e-7)
    distances.sum().backward()
    assert y.grad is not None and y.grad.abs().sum() > 0


def _load_without_digest(folder):
    def load(url, *args, **kwargs):
        return torch.load(folder / "checkpoints" / url.rsplit("/", 1)[1], weights_only=True)

    return load
