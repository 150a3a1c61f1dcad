"""Runs beside each other: paired on the same images, verdicts only where there are seeds enough."""

import numpy as np
import pytest

from bmjax.analysis.report.facts import read_facts
from bmjax.analysis.report.paired import fields_that_differ, image_interval, paired
from bmjax.config import Config, ModelConfig
from tests.helpers.run_folder import write_run


def facts(folder, name, seed=0, skill=0.4, attention="none", **more):
    config = Config(name=name, seed=seed, model=ModelConfig(weights=None, attention=attention))
    write_run(folder / name, seed=100 + seed, skill=skill, config=config, **more)
    return read_facts(folder / name)


def test_one_run_each_has_an_interval_of_its_images_and_no_verdict(tmp_path):
    runs = [facts(tmp_path, "a"), facts(tmp_path, "b", seed=1, skill=0.8, attention="soft")]
    found = paired(runs)
    first, second = found.pairs
    assert (found.split, found.n, found.seeds) == ("test", 40, 1)
    assert (first.difference, first.verdict, second.verdict) == (None, "", "")
    assert second.difference == pytest.approx(second.accuracy - first.accuracy)
    assert second.alone is not None
    assert (second.alone[0] - second.alone[1]) / 40 == pytest.approx(second.difference)
    assert second.low < second.difference < second.high
    names = dict(fields_that_differ(runs))
    assert names["model.attention"] == ['"none"', '"soft"']
    assert names.keys() == {"model.attention", "seed"}


def test_two_seeds_give_no_verdict_and_three_do(tmp_path):
    runs = [facts(tmp_path, f"a{s}", s, 0.2) for s in range(3)]
    runs += [facts(tmp_path, f"b{s}", s, 0.9, "soft") for s in range(3)]
    assert all(pair.verdict == "" for pair in paired(runs[:2] + runs[3:5]).pairs)
    found = paired(runs)
    assert found.seeds == 3
    assert [pair.name for pair in found.pairs] == ["a0", "b0"]
    assert found.pairs[1].verdict.startswith("b0: better than a0 by ")


def test_other_images_are_not_paired(tmp_path):
    found = paired([facts(tmp_path, "a"), facts(tmp_path, "b", prefix="other/")])
    assert found.pairs == ()
    assert "on other images" in found.why_not
    (tmp_path / "a" / "results.json").unlink()
    assert (
        "not all evaluated on validation, or all on test"
        in paired([read_facts(tmp_path / "a"), read_facts(tmp_path / "b")]).why_not
    )


@pytest.mark.parametrize(("n", "only_first", "only_second"), [(50, 0.05, 0.1), (200, 0.1, 0.1), (400, 0.02, 0.06)])
def test_the_interval_of_two_networks_holds_95_percent(n, only_first, only_second):
    r = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        kind = r.choice(3, n, p=[only_first, only_second, 1 - only_first - only_second])
        low, high = image_interval(kind == 0, kind == 1)
        held += low <= only_second - only_first <= high
    assert 0.935 < held / 2000 < 0.985
