"""`eqvae reproduce causes`: how much of EQ-VAE's gain is scale, how much is spectrum, how much is equivariance?

Each row is set beside the control, the same fine-tuning without tau, polished alike, and beside EQ-VAE. What would
count for or against each cause was written down before the runs: docs/log.md.
"""

from dataclasses import replace

from eqvae.paper.arms import Arm, equivariant, low_passed, more_training
from eqvae.paper.cells import Cell, Row, TableItem, columns, evaluation_cells, gfid_cell, protocol
from eqvae.paper.plan import PlannedAutoencoder
from eqvae.paper.setting import Setting

CAUSES = "causes"
"""`causes.md` and `causes.json`."""

_CONTROL, _OURS = "control: Equation 1", "EQ-VAE"

_AS_IT_WAS = "as it was"

_KEYS = ("gfid", "gkid", "rfid", "rotation", "scale", "spectrum")


def causes(setting: Setting) -> TableItem:
    """DiT-B on latents that have one property of EQ-VAE's, and on those that have all."""
    base = setting.autoencoders["SD-VAE"]
    control, ours = more_training(setting, base), equivariant(setting, base)
    arms = {
        _AS_IT_WAS: _arm(setting, setting.base(base)),
        _CONTROL: _arm(setting, control),
        _OURS: _arm(setting, ours),
        "scales only": _arm(setting, equivariant(setting, base, transforms="scale")),
        "rotations only": _arm(setting, equivariant(setting, base, transforms="rotation")),
        "spectrum only: low-passed as EQ-VAE's": _arm(setting, low_passed(setting, base)),
        "deviation only: multiplied to EQ-VAE's": replace(_arm(setting, control), is_fixed=True, deviation_of=ours),
        "EQ-VAE, times the base's factor": replace(_arm(setting, ours), is_fixed=True),
    }
    return TableItem(
        item=CAUSES,
        title="scale, spectrum or equivariance?",
        source="none, the question is ours",
        scale=setting.name,
        columns=columns(setting.reference.features, _KEYS),
        rows=tuple(
            Row(
                label=label,
                here=arm.autoencoder.name,
                expected={},
                cells=_cells(arm),
                against="" if label == _CONTROL else _CONTROL,
                also_against="" if label in (_CONTROL, _OURS, _AS_IT_WAS) else _OURS,
            )
            for label, arm in arms.items()
        ),
        gain=(_CONTROL, _OURS),
        notes=(
            protocol(setting, "dit"),
            "Latents are normalized by each channel's mean and deviation, but for the last two rows: there they are "
            "multiplied by one number, which leaves the deviation that EQ-VAE's have with the base's factor.",
        ),
    )


def _arm(setting: Setting, autoencoder: PlannedAutoencoder) -> Arm:
    return Arm(setting=setting, family="dit", size="b", autoencoder=autoencoder)


def _cells(arm: Arm) -> dict[str, Cell]:
    own = evaluation_cells(arm.setting, arm.autoencoder)
    cells = {"gfid": gfid_cell(arm), "gkid": gfid_cell(arm, "kid"), **own}
    return {key: cells[key] for key in _KEYS}
