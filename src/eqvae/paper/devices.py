"""Devices that costs are estimated for: their peaks, and what of these is reached."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device by its peaks, and what of them a run is taken to reach."""

    bf16_flops_per_sec: float
    """Of dense matrix products, accumulated in fp32."""

    fp32_flops_per_sec: float
    """Without TF32, which `eqvae` does not use."""

    reached_share: float
    """Of either peak, in (0, 1]."""


# fmt: off
_ROWS = (
    # name          bf16      fp32      share
    ("a100-80gb",   312e12,   19.5e12,  0.35),
    ("h100",        989.4e12, 66.9e12,  0.30),
    ("h200",        989.4e12, 66.9e12,  0.30),
    ("rtx-4090",    165.2e12, 82.6e12,  0.35),
    ("cpu",         1.37e12,  0.46e12,  0.12),
)
# fmt: on

DEVICES: dict[str, Device] = {
    name: Device(bf16_flops_per_sec=bf16, fp32_flops_per_sec=fp32, reached_share=share)
    for name, bf16, fp32, share in _ROWS
}
"""Named devices. GPUs' peaks are NVIDIA's: data sheets of A100 SXM (80 GB), H100 SXM and H200 SXM, where figures "with
sparsity" are halved, and the Ada architecture's white paper. Their shares are assumptions, usual for transformers of
published sizes in eager mode, not measurements; small networks reach far less.

`cpu` is two cores of an Intel Xeon with AMX. Its peak is twice the 684 GFLOP/s that a bf16 matrix product reached on
one (docs/results/benchmarks/train_generator.json), and fp32 took two to three and a half times as long as bf16 there.
Its share lies between what the fine-tuning of tiny-kl-f2 at 32 px reached (0.04, with other jobs on the machine) and
DiT-Ti/2 with 256 tokens (0.23), DiT-S/2 (0.36) or SD-VAE at 256 px (0.6)."""
