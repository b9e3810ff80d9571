"""Intervals: the middle 95 % of the bootstrap draws."""

import numpy as np
import pandas as pd
import pytest

from tasks.measures import draw_patients, summarise


def test_an_interval_leaves_out_two_and_a_half_percent_of_the_draws_on_each_side() -> None:
    draws = np.random.default_rng(0).permutation(np.linspace(0, 1, 1_001))
    assert summarise(np.array([0.4, *draws]), "unused") == {"value": 0.4, "low": 0.025, "high": 0.975}


def test_draws_that_are_no_number_are_left_out_and_a_value_that_is_none_has_its_reason() -> None:
    assert summarise(np.array([0.4, np.nan, 0.3, 0.3]), "unused") == {"value": 0.4, "low": 0.3, "high": 0.3}
    nothing = summarise(np.array([np.nan, 0.3]), "a class is missing")
    assert nothing == {"value": None, "low": None, "high": None, "reason": "a class is missing"}


def test_rows_without_a_group_are_refused_and_not_drawn_as_one_patient() -> None:
    weights = draw_patients(pd.Series(["p", "p", "q"], dtype="string"), 50, 0)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 0] != weights[:, 2]).any()
    with pytest.raises(ValueError, match="no group_id"):
        draw_patients(pd.Series(["p", pd.NA], dtype="string"), 50, 0)
