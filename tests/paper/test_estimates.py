"""What a dry run says of costs: every kind of run has one, counted from its configuration."""

import pytest

from eqvae.paper.estimates import estimate
from eqvae.paper.planned import Plan
from eqvae.paper.setting import Setting
from eqvae.paper.tables import table10, table11


@pytest.fixture
def by_command(setting: Setting):
    runs = Plan.of([*table11(setting).runs, *table10(setting).runs]).runs
    return {run.command: run for run in runs}


def test_every_kind_of_run_has_a_cost(setting: Setting, by_command):
    assert set(by_command) == {"reference", "finetune", "encode", "train", "sample", "score"}
    for command, run in by_command.items():
        cost = estimate(run, setting, "cpu")
        assert cost.flops > 0
        assert cost.device_hours > 0
        assert (cost.disk_bytes > 0) == (command != "score")


def test_longer_training_costs_more(setting: Setting, by_command):
    from dataclasses import replace

    run = by_command["train"]
    longer = replace(run, config=replace(run.config, max_steps=40, sample_every=20))
    one, other = (estimate(each, setting, "cpu").flops for each in (run, longer))
    assert 2 * one < other < 11 * one
