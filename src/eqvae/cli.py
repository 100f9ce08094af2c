"""`eqvae COMMAND ...`: finds the command, runs it, turns errors into exit codes."""

import importlib
import sys
import warnings
from collections.abc import Sequence

from eqvae.errors import Interrupted, UserError, nearest_name

COMMANDS = {
    "demo": "the whole story on built-in photographs, minutes on two CPU cores",
    "finetune": "fine-tune an autoencoder with EQ-VAE",
    "evaluate": "measure an autoencoder: equivariance, reconstruction, latents",
    "encode": "write an autoencoder's latents of images into a cache for generators",
    "train": "train a generator on a latent cache: DiT, SiT, SiT + REPA, MaskGIT",
    "sample": "draw images from a trained generator",
    "score": "score samples against a reference: FID, sFID, KID, Inception Score, precision, recall",
    "compare": "how much faster a generator learns: curves, time-to-quality speed-up, intervals",
    "rank": "order autoencoders by how well the same small generator learns their latents",
    "reproduce": "tables and figures of the paper: plan, run or resume, write them",
    "report": "one HTML page from the folders that the other commands wrote",
    "convert": "write an autoencoder in diffusers' format, or under CompVis' (LDM's) names",
}

USAGE = """usage: eqvae COMMAND [...]

EQ-VAE: equivariance-regularized latent spaces for image generation (arXiv:2502.09509).

{commands}

'eqvae COMMAND --help' lists a command's flags."""


def main() -> None:
    """Run the command line and exit: 0 done, 2 wrong input, 130 interrupted and resumable."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command."""
    try:
        return _dispatch(list(arguments))
    except UserError as error:
        print(f"eqvae: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        where = f": '{error.filename}'" if error.filename else ""
        mend = "Check the path, its permissions and the space left" if error.errno else ""
        print(f"eqvae: {UserError(f'{error.strerror or error}{where}', mend)}", file=sys.stderr)  # noqa: T201
        return 2
    except Interrupted as stop:
        print(f"eqvae: interrupted, {stop}", file=sys.stderr)  # noqa: T201
        return 130
    except KeyboardInterrupt:
        print("eqvae: interrupted", file=sys.stderr)  # noqa: T201
        return 130


def _dispatch(arguments: list[str]) -> int:
    width = max(map(len, COMMANDS))
    usage = USAGE.format(commands="\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()))
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage)  # noqa: T201
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from eqvae import __version__

        print(f"eqvae {__version__}")  # noqa: T201
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(f"eqvae has no command '{command}'", nearest_name(command, COMMANDS))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of the libraries; what a user should know is said by our own lines
    module = importlib.import_module(f"eqvae.runs.{command}_command")
    module.command(rest)
    return 0
