"""Weights put into a model strictly: every name and every shape has to fit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eqvae.errors import UserError

_NUM_NAMED = 3


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    model_name: str | None = None,
    mend: str = "Are weights and config.json from one model?",
) -> None:
    """Put weights into a model whose names and shapes they fit exactly."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:_NUM_NAMED])}{', ...' if len(keys) > _NUM_NAMED else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if keys
    ]
    if faults:
        raise UserError(
            f"The weights in '{source}' do not fit {model_name or type(model).__name__}: {'; '.join(faults)}",
            mend,
        )
    contiguous: dict[str, Any] = {key: tensor.contiguous() for key, tensor in state.items()}
    model.load_state_dict(contiguous, strict=True, assign=True)
