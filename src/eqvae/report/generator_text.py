"""Generators in words: how they were trained, how samples were drawn, and what a reader must know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eqvae.report.folders import short_name
from eqvae.report.generators import SampleSet, Score, Training, data_name
from eqvae.report.score_tables import score_tables
from eqvae.report.tables import finite


def describe_training(training: Training) -> str:
    """Say what a run has done so far."""
    config, step = training.config, training.step
    if not step:
        return "No step was logged yet"
    steps = "1 step" if step == 1 else f"{step:,} steps"
    count, wanted = training.num_images(step), config.get("max_steps")
    parts = [steps if training.is_finished or wanted is None else f"{step:,} of {wanted:,} steps"]
    if count is not None:
        parts[0] += f" of {config['batch_size']:,} images"
        parts.append(f"{count:,} images seen")
    times = [time for record in training.records("train")[-1:] if (time := finite(record.get("training_sec")))]
    parts += [_duration(time) for time in times]
    return ", ".join(parts)


def training_facts(training: Training) -> dict[str, str]:
    """List how a generator was trained and measured."""
    config, facts = training.config, {"Training": describe_training(training)}
    if (count := finite(training.metrics.get("num_parameters"))) is not None:
        facts["Network"] = f"{count / 1e6:,.1f} million parameters"
    settings = {"learning rate": "learning_rate", "EMA": "ema_decay", "seed": "seed"}
    known = {name: finite(config.get(key)) for name, key in settings.items()}
    facts["Settings"] = ", ".join(f"{name} {value:g}" for name, value in known.items() if value is not None)
    if config.get("reference") is not None:
        steps = f", {config['watch_steps']} sampling steps" if config.get("watch_steps") else ""
        facts["Measured"] = f"against {data_name(config['reference'])}{steps}, no guidance, averaged weights"
    return {name: text for name, text in facts.items() if text}


def drawing_facts(samples: SampleSet) -> dict[str, str]:
    """List how samples were drawn."""
    config, card = samples.config, samples.card
    trained = f" after {card['num_steps']:,} steps of training" if isinstance(card.get("num_steps"), int) else ""
    return {
        "Generator": f"{_generator_name(samples)}{trained}",
        "Samples": _count(samples),
        "Sampler": _sampler(config, card),
        "Guidance": _guidance(config),
        "Weights": _weights(config),
        "Classes": str(config.get("classes", "unknown")),
        "Seed": str(config.get("seed", "unknown")),
    }


def describe_drawing(samples: SampleSet) -> str:
    """Say in a sentence how samples were drawn."""
    facts = drawing_facts(samples)
    return (
        f"{facts['Samples']} samples of {_generator_name(samples)} by {facts['Sampler']}, "
        f"{'no guidance' if facts['Guidance'] == 'none' else 'guidance ' + facts['Guidance']}, seed {facts['Seed']}"
    )


def generator_notes(trainings: Sequence[Training], scores: Sequence[Score]) -> list[str]:
    """Say what a reader must know before comparing, and what is unfinished."""
    found = [f"{item.name}: the run has no journal yet." for item in trainings if not item.journal]
    unfinished = [item for item in trainings if item.journal and not item.is_finished]
    found += [f"{item.name}: not finished, {describe_training(item)}." for item in unfinished]
    tables = score_tables(scores)
    if len(tables) > 1:
        found.append("The scores have different references, so they stand in tables of their own.")
    for item in tables:
        counts = dict.fromkeys(score.metrics.get("num_samples") for score in item.scores)
        if len(counts) > 1:
            listed = ", ".join(f"{count:,}" for count in counts if isinstance(count, int))
            found.append(
                f"Scores against {item.reference} are of different numbers of samples ({listed}): the Fréchet distance "
                "falls as this grows, so only those of equal numbers are compared."
            )
        features = dict.fromkeys(str(score.config.get("features")) for score in item.scores)
        if len(features) > 1:
            found.append(
                f"Scores against {item.reference} by different features ({', '.join(features)}) stand in columns of "
                "their own: they cannot be compared."
            )
    return found


def _generator_name(samples: SampleSet) -> str:
    card = samples.card
    on = f" on {short_name(card['autoencoder'])}" if "autoencoder" in card else ""
    return f"{card.get('recipe', short_name(samples.config.get('run', 'a generator')))}{on}"


def _count(samples: SampleSet) -> str:
    count = samples.metrics.get("num_samples", samples.config.get("num_samples"))
    return f"{count:,}" if isinstance(count, int) else "unknown"


def _sampler(config: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """With the published one where none was named, as `eqvae sample` draws."""
    recipe = str(card.get("recipe", ""))
    published = "confidence" if recipe.startswith("maskgit") else "ddpm" if recipe.startswith("dit") else "sde"
    name = config.get("sampler") or published
    if name == "dopri5":
        return f"{name}, relative tolerance {config.get('rtol', 1e-3):g}"
    eta = f", eta {config['ddim_eta']:g}" if name == "ddim" and config.get("ddim_eta") else ""
    return f"{name} in {config.get('num_steps', '?')} steps{eta}"


def _guidance(config: Mapping[str, Any]) -> str:
    scale = config.get("guidance_scale", 1.0)
    if scale == 1.0:
        return "none"
    words = f"{scale:g}"
    low, high = config.get("guidance_low", 0.0), config.get("guidance_high", 1.0)
    if (low, high) != (0.0, 1.0):
        words += f" at noise from {low:g} to {high:g}"
    if config.get("guidance_channels") is not None:
        words += f", first {config['guidance_channels']} channels"
    if config.get("guidance_schedule") is not None:
        words += f", {config['guidance_schedule']}"
    if config.get("weak_run") is not None:
        words += f", away from {Path(str(config['weak_run'])).name}"
    return words


def _weights(config: Mapping[str, Any]) -> str:
    if config.get("sigma_rel") is not None:
        return f"averaged, horizon {config['sigma_rel']:g}"
    return "averaged" if config.get("weights", "ema") == "ema" else "as in training"


def _duration(seconds: float) -> str:
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name} of training"
    return f"{seconds:.0f} s of training"
