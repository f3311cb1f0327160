"""Claims about length models: the published figures come out, and the fits hold on data they have not seen."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import spearmanr

from engine.workload.fit_lengths import SOURCES, fit, heldout_error, read_lengths
from engine.workload.length_tables import LOGNORMALS, TABLES
from engine.workload.lengths import FixedLengths, LognormalLengths, NamedLengths, QuantileLengths

NAMES = [*TABLES, *LOGNORMALS]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", NAMES)
def test_a_named_model_draws_whole_positive_lengths_and_stable_prefixes(name):
    model = NamedLengths(name=name)
    long, short = model.draw(rng(), 1000), model.draw(rng(), 10)
    assert min(long.prompt_tokens.min(), long.output_tokens.min()) >= 1
    assert long.prompt_tokens[:10].tolist() == short.prompt_tokens.tolist()
    assert long.output_tokens[:10].tolist() == short.output_tokens.tolist()


def test_lmsys_turns_have_the_published_means():
    drawn = NamedLengths(name="lmsys_chat_1m").draw(rng(), 200_000)
    assert drawn.prompt_tokens.mean() == pytest.approx(69.5, rel=0.03)
    assert drawn.output_tokens.mean() == pytest.approx(214.5, rel=0.03)


def test_lmsys_turns_with_history_have_the_published_quantiles():
    drawn = NamedLengths(name="lmsys_chat_1m_4k").draw(rng(), 200_000)
    assert np.quantile(drawn.prompt_tokens, [0.5, 0.9]) == pytest.approx([417, 1678], rel=0.03)
    assert np.quantile(drawn.output_tokens, [0.5, 0.9]) == pytest.approx([139, 484], rel=0.03)
    assert (drawn.prompt_tokens + drawn.output_tokens).max() <= 4096


def test_a_lognormal_without_spread_is_its_median():
    model = LognormalLengths(prompt_median=100.4, prompt_sigma=0, output_median=7, output_sigma=0)
    assert np.unique(model.draw(rng(), 5).prompt_tokens).tolist() == [100]
    assert FixedLengths(prompt_tokens=3, output_tokens=4).draw(rng(), 2).output_tokens.tolist() == [4, 4]


def test_quantiles_come_back_out_of_the_draws():
    model = QuantileLengths(
        levels=[0, 0.5, 1], prompt_quantiles=[10, 100, 1000], output_quantiles=[1, 2, 3], correlation=0.7
    )
    drawn = model.draw(rng(), 100_000)
    assert np.quantile(drawn.prompt_tokens, [0, 0.25, 0.5, 1]) == pytest.approx([10, 10**1.5, 100, 1000], rel=0.03)
    assert spearmanr(drawn.prompt_tokens, drawn.output_tokens).statistic == pytest.approx(0.63, abs=0.06)


def test_scales_multiply_the_lengths():
    plain, double = (NamedLengths(name="azure_code", output_scale=by).draw(rng(), 1000) for by in (1.0, 2.0))
    assert (double.output_tokens == 2 * plain.output_tokens).all()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: NamedLengths(name="sharegtp"), "name"),
        (lambda: FixedLengths(prompt_tokens=0, output_tokens=1), "prompt_tokens"),
        (lambda: QuantileLengths(levels=[0, 1], prompt_quantiles=[5, 4], output_quantiles=[1, 2]), "prompt_quantiles"),
        (lambda: QuantileLengths(levels=[0, 0.5], prompt_quantiles=[5, 6], output_quantiles=[1, 2]), "levels"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(make, key):
    with pytest.raises(ValidationError, match=key):
        make()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_refit_gives_the_committed_table_and_holds_on_unseen_rows(data_dir, name):
    file, prompt_column, output_column, most = SOURCES[name]
    prompt, output = read_lengths(data_dir / file, prompt_column, output_column)
    model = fit(prompt, output, most)
    assert model.prompt_quantiles == TABLES[name]["prompt_quantiles"]
    assert model.output_quantiles == TABLES[name]["output_quantiles"]
    assert model.correlation == TABLES[name]["correlation"]
    error = heldout_error(prompt, output, most)
    # Spec-Bench has 280 rows to compare with, where chance alone makes .05.
    bound = 0.08 if name == "specbench" else 0.045
    assert max(error["prompt_ks"], error["output_ks"]) < bound
