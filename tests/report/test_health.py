"""What a line of metrics says about its steps, and when it raises an alarm."""

from pathlib import Path

import numpy as np
import pytest

from d2g_jax.report import health


def line(steps):
    return health.summary([(8 * i, {"generator": metrics}) for i, metrics in enumerate(steps)])


def test_means_are_over_steps_and_finite_values():
    values = line([{"a": 1.0, "b": np.nan}, {"a": np.float32(3.0), "b": np.inf}, {"a": np.nan, "b": -np.inf}])
    assert values == {"a": 2.0, "b": None}


def test_sums_and_counts_are_added_up_before_they_are_divided():
    values = line([{"gap": [6.0, 3.0], "never": [0.0, 0.0]}, {"gap": np.array([0.0, 0.0])}, {"gap": [4.0, 1.0]}])
    assert values == {"gap": 2.5}


def test_ratios():
    generator = {"latent_std": 0.9, "target_std": 1.2, "latent_mean": 0.1, "target_mean": 0.4}
    generator |= {"gradient_regression": 4.0, "gradient_adversarial": 1.0}
    values = health.summary([(8, {"generator": generator, "discriminator": {"loss_discriminator": 0.9},
                                  "r1": {"loss_r1": 0.1}})])  # fmt: skip
    assert values["latent_std_ratio"] == pytest.approx(0.75)
    assert values["latent_shift"] == pytest.approx(-0.25)
    assert values["gradient_ratio"] == pytest.approx(0.25)
    assert values["r1_share"] == pytest.approx(0.1)


def told(shares):
    """The alarms of each line of a run whose R1 shares are these."""
    rows = [{} if share is None else {"r1_share": share} for share in shares]
    watch = health.Watch(rows[:2])  # a resumed run is told of the lines so far
    return [watch.see(row) for row in rows[2:]]


def test_an_alarm_begins_with_the_second_line_outside_and_ends_with_the_first_inside():
    on = ["r1_share high"]
    assert told([0.05, 0.9, 0.05, 0.9, 0.9, 0.8, 0.05, 0.9]) == [[], [], on, on, [], []]
    assert told([0.05, 0.9, 0.9, 0.05]) == [on, []]
    assert told([0.9, None, 0.9, None, 0.05, None]) == [on, on, [], []]  # a line without R1 says nothing


def test_a_band_may_wait_for_another_metric():
    idle, listening = {"logit_gap_text": -1.0}, {"logit_gap_text": -1.0, "loss_adversarial": 0.7}
    watch = health.Watch([idle, idle])
    assert [watch.see(row) for row in (idle, listening, listening)] == [[], [], ["logit_gap_text low"]]


def test_every_open_side_has_no_cause_and_every_closed_one_has():
    for band in health.BANDS:
        assert bool(band.below) == (np.isfinite(band.low) and band.metric != "r1_share"), band.metric
        assert bool(band.above) == np.isfinite(band.high), band.metric
    assert "lower adversarial.r1_gamma" in health.explain("r1_share high")
    assert health.explain("unknown high")


def test_the_documentation_has_these_bands():
    text = (Path(__file__).parents[2] / "docs" / "healthy.md").read_text()
    for band in health.BANDS:
        low, high = (f"{end:g}" if np.isfinite(end) else "" for end in (band.low, band.high))
        extent = f"{low} to {high}" if low and high else f"above {low}" if low else f"below {high}"
        assert f"| `{band.metric}` | {extent} |" in text


@pytest.mark.parametrize("missing", ["latent_std", "latent_mean", "target_mean"])
def test_a_window_that_begins_with_an_update_that_is_not_finite_has_no_ratio(missing):
    metrics = {"target_std": 2.0, "target_mean": 0.0, "latent_std": 1.0, "latent_mean": 0.5, missing: np.nan}
    values = line([metrics])
    assert values[missing] is None
    assert not {"latent_std_ratio", "latent_shift"} & values.keys()
