"""Several independent choices at once: the same distribution as SB3's own, only faster."""

import numpy as np
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.distributions import MultiCategoricalDistribution

from runs.learning.choices import Choices, ChoicesPolicy

sizes = st.lists(st.integers(1, 13), min_size=1, max_size=3)


@given(sizes, st.integers(1, 5), st.integers(0, 2**31 - 1), st.sampled_from([0.1, 3.0, 30.0]))
@settings(deadline=None)
def test_it_is_sb3s_distribution(many: list[int], batch: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(spread * rng.normal(size=(batch, sum(many))), requires_grad=True)
    theirs_logits = logits.detach().clone().requires_grad_()
    actions = torch.tensor(rng.integers(many, size=(batch, len(many))))
    ours = Choices(many).proba_distribution(logits)
    theirs = MultiCategoricalDistribution(many).proba_distribution(theirs_logits)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert ours.mode().tolist() == theirs.mode().tolist()
    (ours.log_prob(actions) + ours.entropy()).sum().backward()
    (theirs.log_prob(actions) + theirs.entropy()).sum().backward()
    torch.testing.assert_close(logits.grad, theirs_logits.grad)


def test_draws_have_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5]])
    draws = 40_000
    drawn = Choices([3, 2]).proba_distribution(logits.expand(draws, -1)).sample()
    assert drawn.shape == (draws, 2)
    for i, part in enumerate(logits[0].split([3, 2])):
        expected = part.softmax(0)
        counts = torch.bincount(drawn[:, i], minlength=len(part))
        error = (expected * (1.0 - expected) / draws).sqrt()
        assert ((counts / draws - expected).abs() < 4.0 * error).all()


def test_the_policy_uses_it_and_survives_being_saved(tmp_path: str) -> None:
    box = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)
    policy = ChoicesPolicy(box, spaces.MultiDiscrete([3, 2]), lambda _: 1e-3)
    seen = torch.zeros(6, 4)
    actions, values, log_prob = policy(seen)
    assert (actions.shape, values.shape, log_prob.shape) == ((6, 2), (6, 1), (6,))
    again, same, _ = policy.evaluate_actions(seen, actions)
    torch.testing.assert_close((values, log_prob), (again, same))
    policy.save(f"{tmp_path}/policy")
    loaded = ChoicesPolicy.load(f"{tmp_path}/policy")
    assert isinstance(loaded.action_dist, Choices)
    torch.testing.assert_close(loaded.evaluate_actions(seen, actions)[1], log_prob)
