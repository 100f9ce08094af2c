"""`eqvae reproduce cost`: one change a row, at all scales; its table, its curve, and what it would cost."""

from pathlib import Path

import pytest

from eqvae.artifacts.files import read_json
from eqvae.cli import run
from eqvae.losses.discriminators import MIN_IMAGE_SIZE_PX
from eqvae.paper.arms import varied
from eqvae.paper.cheaper import cost
from eqvae.paper.costs import estimate
from eqvae.paper.execution import execute
from eqvae.paper.plan import Plan
from eqvae.paper.results import write_item
from eqvae.paper.setting import Setting
from eqvae.paper.settings import PAPER, SMALL, TINY
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runtime.processes import ALONE
from eqvae.runtime.run_folder import flat

WHOLE = {
    "small": {"freeze_decoder": False, "lora_rank": 0, "max_steps": 1000, "image_size": 128},
    "paper": {"freeze_decoder": False, "lora_rank": 0, "max_steps": 50_000, "image_size": 256},
    "tiny": {"freeze_decoder": False, "lora_rank": 0, "max_steps": 400, "image_size": 64},
}
CHANGES = {
    "encoder": {"freeze_decoder": True}, "lora-4": {"lora_rank": 4}, "lora-16": {"lora_rank": 16},
    "half": {"max_steps": 0.5}, "quarter": {"max_steps": 0.25},
}  # fmt: skip


@pytest.mark.parametrize("scale", [PAPER, SMALL, TINY], ids=["paper", "small", "tiny"])
def test_each_row_changes_one_thing(scale: Setting):
    plan = Plan.of(cost(scale).runs)
    assert len({each.name for each in plan.runs}) == len(plan.runs)
    tuned = {each.name.partition("+eq")[2].removesuffix("-seed-1").lstrip("-"): each.config.resolved()
             for each in plan.runs if isinstance(each.config, FinetuneConfig)}  # fmt: skip
    recipe = tuned.pop("")
    assert ("unpolished" in tuned) == (scale.finetuning.training.polish_steps > 0)
    whole, base = flat(tuned.pop("unpolished", recipe)), WHOLE[scale.name]
    assert {name: whole[name] for name in base} == base
    crops = {mark: config for mark, config in tuned.items() if mark.endswith("-px")}
    (smaller,) = crops.values()
    assert smaller.image_size < base["image_size"]
    least = smaller.training.mixture().smallest_side(smaller.image_size // 8) * 8
    assert smaller.training.adversarial.adversarial_weight == 0 or least >= MIN_IMAGE_SIZE_PX
    for mark, change in CHANGES.items():
        own = flat(tuned[mark])
        for name, value in change.items():
            assert own[name] == (round(value * base[name]) if isinstance(value, float) else value)
        kept = {name for name in base if own[name] != base[name]}
        assert kept == set(change)
        assert own["polish_steps"] == 0


def test_the_table_and_its_curve(setting: Setting, performed: list[str]):
    item = cost(setting)
    execute(Plan.of(item.runs), setting.root, ALONE)
    files = write_item(item, setting.root)
    assert {file.name for file in files} == {"cost.md", "cost.json", "curve.svg", "curve.png"}
    text, content = files[0].read_text(), read_json(setting.root / "cost.json")
    assert "paper:" not in text
    rows = {row["label"]: row["figures"] for row in content["rows"]}
    assert rows["none"]["sec"]["here"] is None
    assert 10 <= rows["LoRA of rank 4"]["sec"]["here"] < 11
    assert rows["LoRA of rank 4"]["gfid"]["difference"]["num_seeds"] == 2
    assert content["num_finished"] == content["num_runs"] == len(performed)


def test_what_is_frozen_costs_less():
    def flops(**changes: object) -> float:
        planned = varied(TINY, "tiny-kl", "x", polish_steps=0, **changes).run
        assert planned is not None
        return estimate(planned, TINY).bf16_flops

    whole, encoder, lora, half = (
        flops(**changes) for changes in ({}, {"freeze_decoder": True}, {"lora_rank": 4}, {"max_steps": 200})
    )  # fmt: skip
    assert lora < encoder < whole
    assert half < 0.75 * whole


def test_what_it_would_cost(images: Path, tmp_path: Path, capsys):
    data = ["--data", str(images), "--reference-data", str(images), "--out", str(tmp_path / "cost")]
    assert run(["reproduce", "cost", "--scale", "tiny", "--seeds", "1", "--dry-run", *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("finetune") for line in lines) == 7
    assert not (tmp_path / "cost").exists()
