"""Held-out figures on texts small enough to count by hand."""

import math

import numpy as np
import torch

from engine.models.heldout import conditional_acceptance, lookup_agreement, token_losses


def test_acceptance_is_counted_along_the_steps_that_decoding_takes():
    # Position 0 is the prefill's. Steps start at 1 (accepts 2), 4 (accepts 0), 5 (accepts 3), and 9 would pass the end.
    row = np.array([True, True, True, False, False, True, True, True, True, False, True])
    by_position, tokens_a_step = conditional_acceptance(row[None], drafted=3)
    assert by_position == [2 / 3, 2 / 2, 1 / 2]
    assert tokens_a_step == 1 + 5 / 3


def test_a_position_never_reached_is_not_a_number():
    by_position, tokens_a_step = conditional_acceptance(np.zeros((2, 5), bool), drafted=2)
    assert by_position[0] == 0
    assert math.isnan(by_position[1])
    assert tokens_a_step == 1


def test_lookup_proposes_what_followed_the_latest_longest_match():
    #        0  1  2  3  4  5  6  7  8  9
    text = [1, 2, 3, 1, 2, 4, 9, 1, 2, 4]
    proposed, right = lookup_agreement(np.array([text]), prompt_tokens=5, suffixes=(2, 1))
    # 5: after (1,2) came 3, wrong; 6: 4 is new; 7: 9 is new; 8: (9,1) is new but 1 was followed by 2; 9: (1,2) -> 4.
    assert proposed.tolist() == [[True, False, False, True, True]]
    assert right.tolist() == [[False, False, False, True, True]]


def test_token_losses_are_the_negative_log_probabilities_of_the_next_tokens():
    class Uniform(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            class Output:
                logits = torch.zeros(*input_ids.shape, 7)

            return Output

    losses = token_losses(Uniform(), torch.zeros(11, 5, dtype=torch.long))
    assert losses.shape == (11, 4)
    torch.testing.assert_close(losses, torch.full((11, 4), math.log(7)))
