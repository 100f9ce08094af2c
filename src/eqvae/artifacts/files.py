"""Files: written atomically, readable as text or as safetensors, never pickled; weights fit exactly or not at all."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eqvae.artifacts.expected import check_expected
from eqvae.artifacts.names import JOURNAL
from eqvae.artifacts.parsing import DAMAGE, find_not_finite, parse_json
from eqvae.errors import UserError, printable, readable

_MAX_STEP = 2**31

MAX_JSON_BYTES = 2**25
"""Of one file: ten times what the index of a cache of ImageNet takes."""

_NUM_NAMED = 3


_DIGEST = "sha256"
"""Entry of a safetensors file's metadata: SHA-256 over names, types, shapes, bytes and all other metadata."""

_UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(_UMASK)

_guarded: dict[Path, tuple[int, int]] = {}
"""Device and inode of the folders that this process holds."""


def expanded(path: str | Path) -> Path:
    """Put a home in the place of a leading `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"'{path}' begins with nobody's home", "Write the whole path, or ./ before it") from None


def write_atomically(path: Path, write: Callable[[Path], object], *, former: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to disk and rename it into place.

    What it replaces goes, or is kept as `former`.
    """
    check_still_there(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)
        with temporary.open("rb+") as file:  # Windows syncs what may be written alone
            os.fsync(file.fileno())
        if former is not None and path.exists():
            path.replace(former)
        temporary.replace(path)
    except OSError as error:
        check_still_there(path)
        if error.errno and error.filename is None:  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a folder beside its final place and rename it there; an error leaves nothing half-written."""
    check_still_there(folder)
    folder = folder.resolve() if folder.is_symlink() else folder  # the link stays
    part, former = (folder.with_name(f".{folder.name}.{kind}part") for kind in ("", "former."))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        fill(part)
        shutil.rmtree(former, ignore_errors=True)
        if folder.exists():
            folder.rename(former)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if former.exists() and not folder.exists():
            former.rename(folder)
        shutil.rmtree(former, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a killed process had begun to write."""
    return path.name.startswith(".") and path.name.endswith(".part")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had begun to write into a folder that this process holds."""
    for path in list(folder.rglob(".*.part")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def guard_folder(folder: Path) -> Iterator[None]:
    """Write into a folder as long as it is the same one: somebody may remove it, and even begin another of its name.

    The caller keeps it open, so that no other folder gets its inode.
    """
    key, status = folder.absolute(), folder.stat()
    _guarded[key] = (status.st_dev, status.st_ino)
    try:
        yield
    finally:
        _guarded.pop(key, None)


def check_still_there(path: Path) -> None:
    """Refuse to write into a guarded folder that was removed or replaced."""
    for folder in path.absolute().parents if _guarded else ():
        if folder not in _guarded:
            continue
        try:
            status = folder.stat()
            is_same = _guarded[folder] == (status.st_dev, status.st_ino)
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise UserError(
                f"'{folder}' was removed or replaced while this run wrote into it", "Run the same command to begin anew"
            )


def to_plain(value: Any) -> Any:
    """Turn records, paths, tuples and NumPy scalars into what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8 wherever it is; names of files in it may hold bytes that are no text."""
    write_atomically(path, lambda temporary: temporary.write_text(readable(text), encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically; a number that is not finite is no figure."""
    plain = to_plain(value)
    if (where := find_not_finite(plain)) is not None:
        raise UserError(f"'{path.name}' would hold '{where}', which is not finite", "Has the model diverged?")
    write_text(path, json.dumps(plain, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; all its numbers are finite."""
    mend = "Write it again or remove it"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"'{path}' has more than {MAX_JSON_BYTES >> 20} MiB, too many for what it is", mend)
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Is this a folder that an eqvae command wrote?") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no readable JSON ({error})", mend) from None
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object", mend)
    try:
        check_expected(path.name, content)
    except ValueError as error:
        raise UserError(f"'{path}' is damaged ({error})", mend) from None
    return content


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run, in order; a torn line, as a kill leaves it, and all that is no object is left out."""
    path = folder / JOURNAL
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line, parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            continue
        step = record.get("step", 0) if isinstance(record, dict) else None
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _MAX_STEP:
            records.append(record)
    return records


def check_writable(folder: Path, flag: str) -> None:
    """See whether files can be written into a folder, before a long computation ends in vain."""
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError:  # safetensors would write there, and not read
        raise UserError(f"{flag} '{printable(str(folder))}' is no text in UTF-8", "Choose another folder") from None
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{flag} '{folder}' can't be made: '{existing}' is no folder", "Choose another folder")
    try:  # rather than os.access: it says yes to root for /proc and other places where nothing can be made
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(
            f"{flag} '{folder}' can't be written: '{existing}' takes no files ({error.strerror})",
            "Choose another folder",
        ) from None


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    digest: bool = False,
    former: Path | None = None,
) -> None:
    """Write a safetensors file atomically; with a digest, a damaged one is found when it is read."""
    plain, said = as_written(tensors), dict(metadata or {})
    if digest:
        said[_DIGEST] = _digest(plain, said)

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata=said)
        except SafetensorError as error:  # says in words what the system said in numbers
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None

    write_atomically(path, write, former=former)


def as_written(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file holds them; what lies otherwise in memory is copied."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, and hold it against its digest where it has one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist", "Check the path") from None
    except DAMAGE as error:
        raise UserError(f"'{path}' is truncated or no safetensors file ({error})", "Fetch or write it again") from None
    digest = metadata.pop(_DIGEST, None)
    if digest is None and any(re.fullmatch("[0-9a-f]{64}", value) for value in metadata.values()):
        digest = "one bit of whose name is flipped"
    if digest is not None and digest != _digest(tensors, metadata):
        raise UserError(f"'{path}' is damaged (its digest differs)", "Fetch or write it again")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # a scalar can't be viewed as bytes
    return digest.hexdigest()


def check_finite(tensors: Mapping[str, Tensor], *, source: str, mend: str) -> None:
    """Refuse weights of which one is NaN or infinite: they would make black pictures and figures of nothing."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            numbers = "a number that is" if count == 1 else f"{count} numbers that are"
            raise UserError(f"'{source}' has diverged or is damaged: '{name}' holds {numbers} not finite", mend)


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    model_name: str | None = None,
    mend: str = "Are weights and config.json from one model?",
) -> None:
    """Put weights into a model whose names, shapes and kinds of numbers they fit exactly, if all are finite."""
    expected = model.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    changed = [
        f"{key} {str(state[key].dtype).removeprefix('torch.')} instead of {str(tensor.dtype).removeprefix('torch.')}"
        for key, tensor in expected.items()
        if key in state and state[key].is_floating_point() != tensor.is_floating_point()
    ]
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:_NUM_NAMED])}{', ...' if len(keys) > _NUM_NAMED else ''})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
            ("of another kind", changed),
        )
        if keys
    ]
    if faults:
        raise UserError(
            f"The weights in '{source}' do not fit {model_name or type(model).__name__}: {'; '.join(faults)}", mend
        )
    check_finite(state, source=source, mend="Take an earlier checkpoint of it, or fetch it again")
    contiguous: dict[str, Any] = {key: tensor.contiguous() for key, tensor in state.items()}
    model.load_state_dict(contiguous, strict=True, assign=True)


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest named tensors in their order: 16 hexadecimal digits that change when any number changes."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)  # a scalar can't be viewed as bytes
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
