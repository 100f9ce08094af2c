"""What a report is made of: any of the folders that it draws, each read into a record of its kind."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from eqvae.artifacts import CONFIG, read_json
from eqvae.errors import UserError
from eqvae.report.folders import Evaluation, Run, originating_run, read_evaluation, read_run
from eqvae.report.generators import SampleSet, Score, Training, read_sample_set, read_score, read_training

READERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "evaluate": read_evaluation,
    "finetune": read_run,
    "train": read_training,
    "sample": read_sample_set,
    "score": read_score,
}
"""By the command whose folder it reads."""

DRAWN = "'eqvae evaluate', 'finetune', 'train', 'sample' and 'score'"


class Contents(NamedTuple):
    """All that a report shows, each kind in the order of the folders and with distinct names."""

    evaluations: list[Evaluation]
    runs: list[Run]
    """Of fine-tuning."""
    trainings: list[Training]
    """Of generators."""
    sample_sets: list[SampleSet]
    scores: list[Score]


def read_folders(folders: Sequence[Path]) -> Contents:
    """Read what earlier stages saved; the run that made an evaluated autoencoder is found through its path."""
    if not folders:
        raise UserError("No folder to report on", f"Name the output folders of {DRAWN}")
    found: dict[str, list[Any]] = {command: [] for command in READERS}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        config = _read_config(folder)
        found[config["command"]].append(READERS[config["command"]](folder, config))
    known = {run.folder for run in found["finetune"]}
    for evaluation in found["evaluate"]:
        origin = originating_run(evaluation)
        if origin is not None and origin not in known:
            known.add(origin)
            found["finetune"].append(read_run(origin, _read_config(origin)))
    by_folder, by_folder_above = attrgetter("name"), attrgetter("parent.name")  # some are named after their folder
    return Contents(
        evaluations=_with_distinct_names(found["evaluate"], by_folder),
        runs=_with_distinct_names(found["finetune"], by_folder_above),
        trainings=_with_distinct_names(found["train"], by_folder),
        sample_sets=_with_distinct_names(found["sample"], by_folder_above),
        scores=_with_distinct_names(found["score"], by_folder),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"The folder '{folder}' does not exist", "Check the path")
    config = read_json(folder / CONFIG)
    if config.get("command") not in READERS:
        owner = f"was written by 'eqvae {config['command']}'" if "command" in config else "holds something else"
        raise UserError(f"'{folder}' {owner}", f"A report draws the folders of {DRAWN}")
    return config


Named = TypeVar("Named", Evaluation, Run, Training, SampleSet, Score)


def _with_distinct_names(items: list[Named], tell_apart: Callable[[Path], str]) -> list[Named]:
    """Mark items of the same name by a part of their folders' paths, or by all of it where that does not do."""
    count = Counter(item.name for item in items)
    short = [f"{item.name} ({tell_apart(item.folder)})" if count[item.name] > 1 else item.name for item in items]
    full = [f"{item.name} ({item.folder})" for item in items]
    names = short if len(set(short)) == len(short) else full
    return [replace(item, name=name) for item, name in zip(items, names, strict=True)]
