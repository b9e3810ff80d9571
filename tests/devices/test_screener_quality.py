"""What readings say of a screener's scores: by hand, and without what the screener has learnt from."""

import pandas as pd
import pytest

from tasks.devices.quality import judge_screener
from tasks.files import digest


def readings(*rows: tuple[int, int, float], n_unread: int = 0) -> pd.DataFrame:
    """Training rows (label, device, score), a patient each, and unread pneumonia rows."""
    unread = [(1, None, 0.1)] * n_unread
    return pd.DataFrame(
        [
            {
                "sha256": digest(i),
                "label": label,
                "split": "train",
                "group_id": f"p{i}",
                "device_score": score,
                "device_reading": device,
                "usable": True,
            }
            for i, (label, device, score) in enumerate([*rows, *unread])
        ]
    )


def test_sensitivity_and_specificity_are_those_at_the_threshold() -> None:
    table = readings((1, 1, 0.9), (1, 1, 0.4), (1, 0, 0.1), (1, 0, 0.6), (0, 0, 0.2), (0, 0, 0.3))
    found = judge_screener(table, (), 0.5, 0.3, 50, 1)
    assert found["all"]["n"] == 6
    assert found["all"]["sensitivity"]["value"] == 0.5
    assert found["all"]["specificity"]["value"] == 0.75
    assert found["pneumonia"]["specificity"]["value"] == 0.5
    assert found["normal"]["auc"]["value"] is None and found["normal"]["auc"]["reason"]


def test_cost_is_the_share_of_clean_images_and_residual_the_share_of_kept_ones_with_a_device() -> None:
    table = readings(*[(1, 1, 0.9)] * 6, *[(1, 1, 0.1)] * 2, *[(1, 0, 0.1)] * 6, *[(1, 0, 0.4)] * 2, *[(0, 0, 0.0)] * 4)
    found = judge_screener(table, (), 0.5, 0.3, 50, 1)
    assert found["cost"]["pneumonia"]["value"] == 0.25
    assert found["cost"]["normal"]["value"] == 0.0
    assert found["residual"]["value"] == pytest.approx(2 / 12, abs=1e-4)
    assert found["residual"]["low"] <= found["residual"]["value"] <= found["residual"]["high"]


def test_classes_are_weighed_as_training_has_them_not_as_the_readings_have() -> None:
    table = readings((1, 1, 0.1), (1, 0, 0.1), (0, 0, 0.1), (0, 0, 0.1), n_unread=6)
    found = judge_screener(table, (), 0.5, 0.3, 50, 1)
    assert found["residual"]["value"] == pytest.approx((8 * 0.5) / 10)


def test_readings_that_the_screener_learnt_from_do_not_count() -> None:
    table = readings((1, 1, 0.9), (1, 0, 0.1), (1, 1, 0.1), (0, 0, 0.1))
    known = [table["sha256"][2][:16]]
    found = judge_screener(table, known, 0.5, 0.3, 50, 1)
    assert (found["n_known"], found["all"]["n"]) == (1, 3)
    assert found["all"]["sensitivity"]["value"] == 1.0


def test_without_readings_there_is_a_reason_in_place_of_a_number() -> None:
    found = judge_screener(readings(n_unread=3), (), 0.5, 0.3, 50, 1)
    assert found["all"] == {"n": 0, "reason": "no image is in this group"}
    assert found["residual"]["value"] is None and found["residual"]["reason"]
    assert found["cost"]["pneumonia"]["value"] is None


def test_identical_files_count_once() -> None:
    table = readings((1, 1, 0.9), (1, 0, 0.1), (0, 0, 0.1))
    table = pd.concat([table, table.iloc[:1]], ignore_index=True)
    assert judge_screener(table, (), 0.5, 0.3, 50, 1)["all"]["n"] == 3
