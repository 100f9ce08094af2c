"""Weights in files of anybody's making.

A training code keeps its weights among other things and under names of its own: in containers (`state_dict`, `model`,
`ema`, `vae`), behind prefixes (`first_stage_model.`, `module.`, `_orig_mod.`), beside an optimizer and a discriminator.
Containers and prefixes are one thing here: every tensor of a file gets one dotted name, and a set of weights is what
lies behind a prefix under which all the names that a model must have are found.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from eqvae.artifacts.files import read_json
from eqvae.artifacts.parsing import DAMAGE
from eqvae.artifacts.pickles import read_pickle
from eqvae.errors import UserError

WhichWeights = Literal["ema", "raw"]
"""Averaged over training steps, or as the optimizer left them."""

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put in."""

_AVERAGED = re.compile(r"(^|_)(ema|averaged|swa|shadow)(_|$)")

_OF_TRAINING = re.compile(
    r"loss|model_ema|.*_ema|ema_.*|ema|discriminators?|disc|.*foundation_model|aux_model|linear_proj|teacher|opt.*"
    r"|lr_schedulers?|scheduler|lpips|perceptual_loss"
)
"""Names at the top of a set, or before one, of what is there for training alone."""

_LITEMA = "model_ema."
"""LDM's averaged weights: the names without their dots, behind this."""

_SLACK_BYTES = 2**20
_FETCH = "Fetch or write it again"


@dataclass(frozen=True, kw_only=True)
class NamedTensors:
    """All tensors of a file, or of a file's shards; each is read when it is taken."""

    path: Path

    getters: Mapping[str, Callable[[], Tensor]]
    """By dotted names, wrappers left out."""

    def take(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Read tensors under new names, floating-point ones in float32."""
        taken: dict[str, Tensor] = {}
        for name, own in names.items():
            try:
                tensor = self.getters[own]()
                taken[name] = _checked(tensor, self.path, own)
            except DAMAGE as error:
                raise UserError(f"'{self.path}' holds no readable '{own}' ({type(error).__name__})", _FETCH) from None
        return taken


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """A set of weights in a file."""

    prefix: str
    """What stood before its names, with a dot at the end; may be empty."""

    which: WhichWeights

    names: Mapping[str, str]
    """Names without the prefix, and in the file."""

    left_out: tuple[str, ...]
    """Modules that are there for training alone, with their numbers of tensors."""

    @property
    def title(self) -> str:
        """As messages name it."""
        return f"'{self.prefix.removesuffix('.')}'" if self.prefix else "the top level"


def is_safetensors(path: Path) -> bool:
    """Whether a file is of this kind, by its first bytes, or at least should be."""
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{" or path.suffix == ".safetensors"
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None


def read_named(path: Path) -> NamedTensors:
    """Read names and places of a file's tensors; what kind of file it is its first bytes say."""
    if path.suffix == ".json":
        return _read_shards(path)
    getters = _safetensors_getters(path) if is_safetensors(path) else _held(read_pickle(path))
    return NamedTensors(path=path, getters=_without_wrappers(getters, path))


def find_sets(named: NamedTensors, anchors: Collection[str]) -> list[WeightSet]:
    """Find the prefixes under which all `anchors`, names that a model must have, lie."""
    names = named.getters
    first = next(iter(anchors))
    prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith("." + first)]
    prefixes = [each for each in prefixes if all(each + anchor in names for anchor in anchors)]
    found = [each for prefix in prefixes if not _is_beside(prefix) for each in _sets_behind(prefix, named)]
    return _distinct(found, named)


def choose_set(
    named: NamedTensors, sets: Iterable[WeightSet], which: WhichWeights | None
) -> tuple[WeightSet, WeightSet | None]:
    """Choose averaged weights, or those asked for; also gives the set of the other kind. Never one of two silently."""
    by_kind: dict[str, list[WeightSet]] = {"ema": [], "raw": []}
    for each in sets:
        by_kind[each.which].append(each)
    wanted = which or ("ema" if by_kind["ema"] else "raw")
    kept = by_kind[wanted]
    if not kept:
        there = by_kind["raw" if wanted == "ema" else "ema"]
        kind = "averaged" if wanted == "ema" else "raw"
        raise UserError(
            f"'{named.path}' holds no {kind} weights, but those of {', '.join(each.title for each in there)}",
            "Leave out --weights",
        )
    if len(kept) > 1:
        raise UserError(
            f"'{named.path}' holds {len(kept)} sets of weights: {', '.join(each.title for each in kept)}",
            "Save the one that you want in a file of its own",
        )
    others = by_kind["raw" if wanted == "ema" else "ema"]
    return kept[0], others[0] if others else None


def describe_choice(
    named: NamedTensors, chosen: WeightSet, other: WeightSet | None, *, takes_both: bool = False
) -> str | None:
    """Say in one line what was found in a file and taken, where there is anything to say."""
    if not chosen.prefix and other is None and not chosen.left_out:
        return None
    kind = "averaged weights" if chosen.which == "ema" else "weights"
    parts = [f"'{named.path}': {len(chosen.names)} {kind} of {chosen.title}"]
    if other is not None and takes_both:
        parts.append(f"and {len(other.names)} raw ones of {other.title}")
    elif other is not None:
        how = f"--weights {other.which}, or #{other.which} behind its name, takes them"
        parts.append(f"not those of {other.title} ({how})")
    if chosen.left_out:
        parts.append(f"left out: {', '.join(chosen.left_out)}")
    return "; ".join(parts)


def plain_names(named: NamedTensors, own: Collection[str] = ()) -> dict[str, str]:
    """Take off what all names begin with, where no prefix is found: containers, until a name of the model's `own`."""
    names, tops = {name: name for name in named.getters}, {name.partition(".")[0] for name in own}
    while all("." in name for name in names):
        first = {name.partition(".")[0] for name in names}
        if len(first) != 1 or first <= tops or min(first).isdecimal():
            break
        names = {name.partition(".")[2]: place for name, place in names.items()}
    return names


def compare_names(before: Collection[str], after: Collection[str], num_numbers: int) -> str:
    """Report how the names of a model's tensors changed in a conversion."""
    num_kept = len({*before} & {*after})
    parts = [f"{num_kept} under the same names", f"{len(after) - num_kept} under other ones"]
    if (surplus := len(after) - len(before)) != 0:
        parts.append(f"{abs(surplus)} {'added' if surplus > 0 else 'left out'}")
    return f"{len(after)} tensors, {num_numbers:,} numbers: {', '.join(parts)}"


# Sets ----------------------------------------------------------------------------------------------------------------


def _is_beside(prefix: str) -> bool:
    """Whether a prefix leads into what is there for training alone; averaged weights are not."""
    parts = prefix.split(".")[:-1]
    return any(_OF_TRAINING.fullmatch(part) is not None and not _AVERAGED.search(part) for part in parts)


def _sets_behind(prefix: str, named: NamedTensors) -> list[WeightSet]:
    own = {name.removeprefix(prefix): name for name in named.getters if name.startswith(prefix)}
    beside = [name for name in own if _OF_TRAINING.fullmatch(name.partition(".")[0]) and "." in name]
    counted = Counter(name.partition(".")[0] for name in beside)
    kept = {name: place for name, place in own.items() if name.partition(".")[0] not in counted}
    which: WhichWeights = "ema" if any(map(_AVERAGED.search, prefix.split("."))) else "raw"
    averaged = _litema_names(kept, own)
    if averaged:
        counted.pop(_LITEMA[:-1])
    left_out = tuple(f"{name} ({count})" for name, count in counted.items())
    sets = [WeightSet(prefix=prefix, which=which, names=kept, left_out=left_out)]
    if averaged:
        names = kept | averaged
        sets.append(WeightSet(prefix=f"{prefix}{_LITEMA}", which="ema", names=names, left_out=left_out))
    return sets


def _litema_names(kept: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Give LDM's averaged weights the names that they had before their dots were taken out."""
    dotless = {name.replace(".", ""): name for name in kept}
    found = {name.removeprefix(_LITEMA): place for name, place in own.items() if name.startswith(_LITEMA)}
    return {dotless[name]: place for name, place in found.items() if name in dotless}


def _distinct(sets: list[WeightSet], named: NamedTensors) -> list[WeightSet]:
    """Leave out sets that are another one's very tensors under other names."""
    kept: list[WeightSet] = []
    for each in sets:
        if not any(_are_same(each, other, named) for other in kept if other.which == each.which):
            kept.append(each)
    return kept


def _are_same(one: WeightSet, other: WeightSet, named: NamedTensors) -> bool:
    if one.names.keys() != other.names.keys():
        return False
    for name in one.names:
        a, b = named.getters[one.names[name]](), named.getters[other.names[name]]()
        if a.shape != b.shape or a.dtype != b.dtype or not (a.data_ptr() == b.data_ptr() or torch.equal(a, b)):
            return False
    return True


# Files ---------------------------------------------------------------------------------------------------------------


def _without_wrappers(getters: Mapping[str, Callable[[], Tensor]], path: Path) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {}
    for name, getter in getters.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in found:
            raise UserError(f"'{path}' holds '{short}' twice, with and without wrappers", "Save one of them alone")
        found[short] = getter
    return found


def _held(tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    return {name: partial(lambda tensor: tensor, tensor) for name, tensor in tensors.items()}


def _safetensors_getters(path: Path) -> dict[str, Callable[[], Tensor]]:
    def get(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            return {name: partial(get, name) for name in file.keys()}  # noqa: SIM118
    except DAMAGE as error:
        raise UserError(f"'{path}' is truncated or no safetensors file ({error})", _FETCH) from None


def _read_shards(index: Path) -> NamedTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise UserError(f"'{index}' names no shards", "Fetch it again")
    getters: dict[str, Callable[[], Tensor]] = {}
    for name in sorted(set(weight_map.values())):
        getters |= read_named(index.with_name(Path(name).name)).getters  # a shard lies beside its index, nowhere else
    return NamedTensors(path=index, getters=getters)


def _checked(tensor: Tensor, path: Path, name: str) -> Tensor:
    """Refuse what is no plain array of numbers, or more than its file holds; floating-point numbers become float32."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    if not is_plain or tensor.dtype.is_complex or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise UserError(f"'{path}' holds '{name}' in a form that is not read", "Save dense tensors of numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes() + _SLACK_BYTES:
        raise UserError(
            f"'{path}' is damaged: '{name}' asks for {tensor.numel() * tensor.element_size()} bytes, and its storage "
            f"has {tensor.untyped_storage().nbytes()}",
            _FETCH,
        )
    tensor = tensor.detach()
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()
