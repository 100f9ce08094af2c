"""`eqvae push RUN NAME`: a trained autoencoder or generator goes to the hub, or into a folder, with its card."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from eqvae.artifacts.files import check_writable, expanded, read_json, replace_folder, write_json, write_text
from eqvae.artifacts.names import (
    AUTOENCODER,
    CONFIG,
    CONTACT_SHEETS,
    ENVIRONMENT,
    GENERATOR,
    GENERATOR_CARD,
    METRICS,
    MODEL_CARD,
    VALIDATION,
)  # fmt: skip
from eqvae.drawing.model_page import autoencoder_page, generator_page, without_local_paths
from eqvae.errors import UserError

_TRANSPORTS = frozenset(("httpx", "httpx2", "httpcore", "requests", "urllib3"))
"""Packages that speak HTTP for `huggingface_hub`, by its version."""

_LOCAL = ("/", "./", "../", "~")
"""How a NAME begins that is a folder."""

_RECORDS = {METRICS: "metrics.json", CONFIG: "recipe.json", ENVIRONMENT: "environment.json"}
"""What of a run's records goes along, and its name there: `config.json` is the model's own."""


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Publish a trained autoencoder or generator with a card that says where each figure comes from."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The finished folder of `eqvae finetune` or `eqvae train`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Repository on the hub, `OWNER/NAME`; or a folder, which begins with `./`, `../`, `/` or `~`."""

    license: str | None = None
    """The hub's name of the licence, for example `mit`; None: the card says that it is not stated."""

    private: bool = False
    """Make a new repository that only its owners see."""

    dry_run: bool = False
    """Write what would be pushed into `hub` in the run's folder, and stop."""


def command(config: PushConfig) -> str:
    """Push, and say where the model is."""
    return push(config)


def push(config: PushConfig) -> str:
    """Publish a run's model: weights, card, pictures, figures and recipe, without the paths of this machine.

    Args:
        config: What to push, and where.

    Returns:
        The repository's address, or the folder.

    Raises:
        UserError: If the run has not finished, the name is taken or none, or the hub can't be reached.
    """
    if not config.run.is_dir():
        raise UserError(f"The folder '{config.run}' does not exist", "Check the path")
    is_local = config.name.startswith(_LOCAL)
    folder = config.run / "hub" if config.dry_run else expanded(config.name)
    if not is_local:
        _check_name(config.name)
    if is_local or config.dry_run:
        _check_folder(folder)
        title = folder.resolve().name if is_local else config.name

        def fill(part: Path) -> None:
            _fill(part, config, title)
            _check_lost(folder, part)

        replace_folder(folder, fill)
        return str(folder)
    with tempfile.TemporaryDirectory(prefix="eqvae-push-") as temporary:
        _fill(Path(temporary), config, config.name)
        return _upload(Path(temporary), config)


def _check_name(name: str) -> None:
    """Refuse what is no repository's name, or could be meant for a folder."""
    if Path(name).name and Path(name).exists() and ".." not in Path(name).parts:
        raise UserError(f"'{name}' is a folder here, and would be a repository", f"Write './{name}' for the folder")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"'{name}' is no repository's name", "Give OWNER/NAME, or a folder as ./NAME") from None


def _check_folder(folder: Path) -> None:
    """Refuse to replace what no push has written, and what a command lies in."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"'{folder}' is where you are, or above it", "Give a folder as ./NAME")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / "recipe.json").is_file():
        raise UserError(f"'{folder}' exists and holds no pushed model", "Choose another folder")
    check_writable(folder, "NAME")


def _check_lost(folder: Path, part: Path) -> None:
    """Refuse to replace a folder that holds what no push writes; pictures are named after their steps."""
    there, new = ({path.name for path in each.iterdir()} if each.is_dir() else set() for each in (folder, part))
    if lost := sorted(name for name in there - new if not name.endswith(".png")):
        raise UserError(f"'{folder}' also holds {', '.join(lost[:3])}", "Move it away, or choose another folder")


def _copy(source: Path, folder: Path) -> None:
    """Copy files of a folder; what of it may only be read can be changed in the copy."""
    for path in source.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _fill(folder: Path, config: PushConfig, title: str) -> None:
    """Lay out what the hub is given."""
    run = config.run
    is_autoencoder = (run / AUTOENCODER / MODEL_CARD).is_file()
    if not is_autoencoder and not (run / GENERATOR / GENERATOR_CARD).is_file():
        raise UserError(
            f"'{run}' holds no trained autoencoder or generator", "Give a folder of 'eqvae finetune' or 'eqvae train'"
        )
    if not (run / METRICS).is_file():
        raise UserError(f"The run in '{run}' has not finished", "The same command that began it goes on with it")
    if is_autoencoder:
        _copy(run / AUTOENCODER, folder)
        _rewrite(folder / MODEL_CARD)
    else:
        _copy(run / GENERATOR, folder / GENERATOR)
        _rewrite(folder / GENERATOR / GENERATOR_CARD)
    for own, name in _RECORDS.items():
        write_json(folder / name, without_local_paths(read_json(run / own)))
    sheets = sorted((run / (VALIDATION if is_autoencoder else CONTACT_SHEETS)).glob("*.png"))
    shown = [sheets[0], sheets[-1]] if is_autoencoder and len(sheets) > 1 else sheets[-1:]
    for sheet in shown:
        shutil.copyfile(sheet, folder / sheet.name)
    write = autoencoder_page if is_autoencoder else generator_page
    page = write(run, title, license_name=config.license, pictures=[sheet.name for sheet in shown])
    write_text(folder / "README.md", page)


def _rewrite(path: Path) -> None:
    write_json(path, without_local_paths(read_json(path)))


def _upload(folder: Path, config: PushConfig) -> str:
    api = HfApi()
    mend = "Try again later; --dry-run writes the folder without the network"
    try:
        where = api.create_repo(config.name, private=config.private, exist_ok=True)
        api.upload_folder(repo_id=where.repo_id, folder_path=folder, commit_message=f"eqvae push {config.name}")
    except LocalTokenNotFoundError:
        raise UserError("the hub wants to know who you are", "Run: hf auth login") from None
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        mend_name = "Log in with 'hf auth login', or choose another NAME"
        raise UserError(f"the hub refused '{config.name}' ({reason})", mend_name) from None
    except Exception as error:
        is_transport = type(error).__module__.partition(".")[0] in _TRANSPORTS  # their errors are no OSErrors
        if not is_transport and not isinstance(error, OfflineModeIsEnabled | OSError):
            raise
        raise UserError(f"the hub can't be reached ({type(error).__name__})", mend) from None
    return str(where)
