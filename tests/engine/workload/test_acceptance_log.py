"""Claims about acceptance logs: what a step reveals, exact replay, fits that recover what made the log, bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.workload.acceptance_log import AcceptanceLog, LoggedTurn, read_acceptance_log, replay
from engine.workload.agreement import DrafterAgreement, IidAgreement
from engine.workload.fit_agreement import (
    fit_agreement,
    fit_iid,
    held_out,
    log_likelihood,
    logged_steps,
    simulated_steps,
    without_loops,
)
from engine.workload.markov import MarkovChain
from engine.workload.workload import WorkloadError

ROW = {"question_id": 1, "task": "qa", "turn": 0, "new_tokens": 6, "n_accepted": [2, 0, 1], "k_drafted": [2, 4, 3]}


def turn(accepted, drafted, new_tokens=None, row=1) -> LoggedTurn:
    accepted, drafted = np.array(accepted), np.array(drafted)
    return LoggedTurn(row, row, "made", 0, int(new_tokens or (accepted + 1).sum()), accepted, drafted)


def log_of(*turns) -> AcceptanceLog:
    return AcceptanceLog(Path("made.jsonl"), list(turns))


def replayed(log, seed=0, fill=None):
    count = len(log.turns)
    return replay(log, np.arange(count), np.zeros(count), np.ones(count), fill or DrafterAgreement(), seed)


def test_a_step_reveals_its_agreements_and_the_miss_that_ended_it_but_nothing_after_a_full_draft():
    # Prefill's token, then 2 of 2 (next unobserved), 0 of 4 (a miss), 1 of 3 (and a miss, which falls off the end).
    assert turn([2, 0, 1], [2, 4, 3]).observed().tolist() == [-1, 1, 1, -1, 0, 1]


steps = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: (min(pair), max(max(pair), 1))),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(0, 1000))
def test_replay_under_the_logged_draft_lengths_accepts_what_was_logged(made, seed):
    accepted, drafted = zip(*made, strict=True)
    workload = replayed(log_of(turn(accepted, drafted)), seed)
    position = 1
    for n, k in made:
        if position >= workload.num_positions:
            break
        assert min(k, workload.run_length[position]) == min(n, workload.num_positions - position)
        position += n + 1
    assert workload.output_tokens.tolist() == [sum(accepted) + len(accepted)]


def test_unobserved_positions_follow_what_surrounds_them():
    # After full drafts in an otherwise perfect turn the unseen very likely agreed too; among misses not.
    easy, hard = turn([9] * 20, [9] * 20), turn([1, 0, 0] * 20, [1, 4, 4] * 20)
    filled = [replayed(log_of(easy, hard), seed) for seed in range(40)]
    unseen = [turn_.observed() == -1 for turn_ in (easy, hard)]
    rates = [
        np.mean([(w.rank[w.offset[i] : w.offset[i + 1]] == 0)[unseen[i]][1:].mean() for w in filled]) for i in range(2)
    ]
    assert rates[0] > rates[1] + 0.15


def test_replay_is_repeatable_and_turns_may_repeat():
    log = log_of(turn([1, 2], [3, 3]), turn([0, 0], [1, 1], row=2))
    workload = replay(log, np.array([1, 0, 1]), [0.0, 1.0, 2.0], [5, 6, 7], DrafterAgreement(), 3)
    again = replay(log, np.array([1, 0, 1]), [0.0, 1.0, 2.0], [5, 6, 7], DrafterAgreement(), 3)
    assert workload.digest == again.digest
    assert workload.output_tokens.tolist() == [2, 5, 2]
    assert workload.source_row.tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_accepted": [2, -1, 1]}, "row 2: n_accepted must be"),
        ({"n_accepted": []}, "row 2: n_accepted must be"),
        ({"k_drafted": [2, 4]}, "row 2: 2 entries in k_drafted, 3 in n_accepted"),
        ({"k_drafted": [1, 4, 3]}, "row 2: step 0 accepted 2 of 1 drafted"),
        ({"new_tokens": 9}, "row 2: new_tokens = 9 does not match"),
        ({"new_tokens": None}, "row 2: new_tokens = None"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_row(tmp_path, change, message):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, **change}) + "\n")
    with pytest.raises(WorkloadError, match=message) as error:
        read_acceptance_log(path)
    assert str(path) in str(error.value)


def test_a_row_without_a_field_or_a_log_without_rows_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"question_id": 1}\n')
    with pytest.raises(WorkloadError, match="row 1: no field turn, new_tokens, n_accepted"):
        read_acceptance_log(path)
    path.write_text("")
    with pytest.raises(WorkloadError, match="no turns"):
        read_acceptance_log(path)
    with pytest.raises(WorkloadError, match=r"no such acceptance log"):
        read_acceptance_log(tmp_path / "none.jsonl")


def test_without_draft_lengths_the_depth_is_the_deepest_acceptance(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({key: value for key, value in ROW.items() if key != "k_drafted"}))
    assert read_acceptance_log(path).turns[0].drafted.tolist() == [2, 2, 2]
    assert read_acceptance_log(path, depth=5).turns[0].drafted.tolist() == [5, 5, 5]


def test_the_likelihood_of_an_iid_model_is_the_product_of_its_positions():
    log = log_of(turn([2, 0, 1, 0], [2, 4, 3, 1]))
    # Observed: four agreements less the one off the end, misses as in the first test.
    seen, _ = log.observed()
    expected = (seen == 1).sum() * np.log(0.7) + (seen == 0).sum() * np.log(0.3)
    assert log_likelihood(IidAgreement(alpha=0.7).chain, log) == pytest.approx(expected)


def synthetic_log(model, turns=200, tokens=200) -> AcceptanceLog:
    shell = log_of(*[turn([0] * tokens, [5, 4] + [3] * (tokens - 2), row=i + 1) for i in range(turns)])
    made = simulated_steps(model, shell)
    kept = [made.turn == i for i in range(turns)]
    return log_of(
        *[turn(made.accepted[k], made.drafted[k], new_tokens=tokens - 1, row=i + 1) for i, k in enumerate(kept)]
    )


def test_a_fit_recovers_the_model_that_made_the_log():
    truth = MarkovChain(
        base_mean=0.5, base_concentration=30.0, easy_share=0.3, easy_logit=1.8, persistence=0.95, momentum=0.3
    )
    log = synthetic_log(truth)
    fitted = fit_agreement(log)
    assert fitted.mean_agreement == pytest.approx(truth.mean_agreement, abs=0.015)
    assert fitted.base_mean == pytest.approx(0.5, abs=0.04)
    assert fitted.persistence == pytest.approx(0.95, abs=0.03)
    assert log_likelihood(fitted, log) >= log_likelihood(truth, log) - 1.0


def test_the_68m_log_is_predicted_on_questions_it_was_not_fitted_to(data_dir):
    log = without_loops(read_acceptance_log(data_dir / "acceptance" / "specbench_vicuna7b_draft68m_even.jsonl"))
    test = log.subset(held_out(log))
    model = fit_agreement(log.subset(~held_out(log)))
    logged, drawn = logged_steps(test), simulated_steps(model, test)
    for candidates in range(1, 9):
        assert drawn.tokens_per_iteration(candidates) == pytest.approx(
            logged.tokens_per_iteration(candidates), rel=0.07
        )
    for position in range(8):
        assert drawn.conditional_acceptance(position)[0] == pytest.approx(
            logged.conditional_acceptance(position)[0], abs=0.07
        )
    seen = (test.observed()[0] >= 0).sum()
    assert (log_likelihood(model, test) - log_likelihood(fit_iid(test), test)) / seen > 0.02


def test_the_whole_68m_log_replays_step_by_step(data_dir):
    log = read_acceptance_log(data_dir / "acceptance" / "specbench_vicuna7b_draft68m_even.jsonl")
    workload = replayed(log)
    assert workload.output_tokens.sum() == sum(turn_.new_tokens for turn_ in log.turns)
    for request, logged in enumerate(log.turns):
        position = workload.offset[request] + 1
        end = workload.offset[request + 1]
        for n, k in zip(logged.accepted, logged.drafted, strict=True):
            if position < end:
                assert min(k, workload.run_length[position]) == min(n, end - position)
            position += n + 1
