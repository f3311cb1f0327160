"""The scheduler: plan and commit. Every backend runs these same compiled functions.

Requests that have arrived join the queue (`engine.core.membership.submit`). One iteration is then `plan` (who gets how
many tokens), the backend's work, and `commit` (tokens are emitted at the iteration's end). The queue is served from its
head. At most the last of the running list is in the middle of its prompt when an iteration begins.

Order of service, admission of whole prompts against a watermark, and preemption of the latest arrival by recompute
follow vLLM (Kwon et al., SOSP 2023, section 4.5); the prompt-token budget follows Sarathi-Serve (Agrawal et al.,
OSDI 2024, section 4), except that it counts prompt tokens only. An instance's `prefill` says how n prompt tokens meet
the decodes; all but the first are the baselines of that paper:

- chunked: decodes run in every iteration, prompts beside them, cut into chunks that fill n (its stall-free batching).
- whole: as before, but no prompt is cut (Orca; its "hybrid-batching-only"). A prompt starts in an iteration when it
  fits what is left of n there; the first one always may.
- first: whole prompts alone while one can be admitted, decodes alone otherwise (vLLM before chunked prefill).
- turns: chunks alone and decodes alone, in turns while there are both (its "chunked-prefills-only").
"""

import math

from engine.compiled import kernel
from engine.core.blocks import blocks_for, give_back, take
from engine.core.deadlines import advance_clock, first_token_out, weight_of
from engine.core.membership import admit, drop_finished, latest_arrival, preempt
from engine.core.state import (
    DECODING,
    FINISHED,
    FIRST,
    ITL_BINS,
    ITL_BINS_PER_E,
    ITL_LOWEST_S,
    MAX_CANDIDATES,
    NOBODY,
    TURNS,
    WHOLE,
)


@kernel
def has_work(state, i):
    """Whether any request of instance `i` is unfinished."""
    instance = state.instances[i]
    return instance.num_running > 0 or instance.num_waiting > 0


@kernel
def _secure_one_slot_each(state, i):
    """Give every decoding request, in order, a slot for its next token, preempting the latest arrivals."""
    instance = state.instances[i]
    block_size = state.limits[i].block_size
    position = 0
    while position < instance.num_decoding:
        request = state.requests[state.running[i, position]]
        if request.blocks * block_size <= request.computed:
            if instance.free_blocks == 0:
                victim = latest_arrival(state, i)
                preempt(state, i, victim)
                if victim < position:
                    position -= 1
                continue
            take(state, i, request, 1)
        position += 1


@kernel
def _plan_decodes(state, i, candidates):
    """Give each decoding request 1 + c_i tokens; c_i is cut by c, by its output limit and by the free KV blocks."""
    instance = state.instances[i]
    batch = state.batches[i]
    block_size = state.limits[i].block_size
    widest = (candidates + block_size) // block_size
    if instance.free_blocks < instance.num_decoding * widest:
        _secure_one_slot_each(state, i)
    num_decodes = instance.num_decoding
    decode_tokens = 0
    steps = 0
    for slot in range(num_decodes):
        r = state.running[i, slot]
        request = state.requests[r]
        tokens = min(1 + candidates, request.output - request.generated)
        if request.computed + tokens > request.blocks * block_size:
            missing = blocks_for(request.computed + tokens, block_size) - request.blocks
            if missing > instance.free_blocks:
                missing = instance.free_blocks
                tokens = min(tokens, (request.blocks + missing) * block_size - request.computed)
            take(state, i, request, missing)
        state.batch_request[i, slot] = r
        state.batch_tokens[i, slot] = tokens
        state.reach[i, slot] = tokens - 1
        decode_tokens += tokens
        steps = max(steps, tokens - 1)
    batch.num_decodes = num_decodes
    batch.decode_tokens = decode_tokens
    batch.decode_kv_tokens = instance.kv_tokens
    batch.candidate_steps = steps


@kernel
def _leave_decodes_out(batch):
    """Plan no decode."""
    batch.num_decodes = 0
    batch.decode_tokens = 0
    batch.decode_kv_tokens = 0
    batch.candidate_steps = 0


@kernel
def _next_to_admit(state, i):
    """The request at the head of the queue if it fits (whole context, watermark kept free), else NOBODY."""
    instance = state.instances[i]
    limits = state.limits[i]
    r = instance.head
    if r == NOBODY or instance.num_running >= limits.max_num_seqs:
        return NOBODY
    reserve = limits.watermark_blocks if instance.num_running > 0 else 0
    if blocks_for(state.requests[r].context, limits.block_size) + reserve > instance.free_blocks:
        return NOBODY
    return r


@kernel
def _plan_prefills(state, i, token_budget, may_admit):
    """Share `token_budget` prompt tokens among the prompts in progress and those of the queue, while they fit."""
    instance = state.instances[i]
    batch = state.batches[i]
    whole = state.limits[i].prefill in (WHOLE, FIRST)
    slot = batch.num_decodes
    position = instance.num_decoding
    left = token_budget
    completed = 0
    while left > 0:
        if position == instance.num_running:
            if not may_admit:
                break
            head = _next_to_admit(state, i)
            if head == NOBODY:
                break
            if whole and slot > batch.num_decodes and state.requests[head].context > left:
                break
            admit(state, i, head)
        r = state.running[i, position]
        request = state.requests[r]
        remaining = request.context - request.computed
        chunk = remaining if whole else min(left, remaining)
        state.batch_request[i, slot] = r
        state.batch_tokens[i, slot] = chunk
        completed += chunk == remaining
        left -= chunk
        slot += 1
        position += 1
    batch.num_prefills = slot - batch.num_decodes
    batch.prefill_tokens = token_budget - left
    batch.prompts_completed = completed


@kernel
def _prompts_alone(state, i, token_budget):
    """Whether the next batch of an instance that keeps prompts and decodes apart is one of prompts."""
    instance = state.instances[i]
    if token_budget <= 0:
        return False
    if state.limits[i].prefill == TURNS and state.batches[i].num_prefills > 0 and instance.num_decoding > 0:
        return False
    return instance.num_running > instance.num_decoding or _next_to_admit(state, i) != NOBODY


@kernel
def plan(state, i, candidates, token_budget):
    """Choose the next batch of instance `i` and write it to `batch_request` / `batch_tokens`, decodes first.

    `candidates` (c, tokens per decoding request) and `token_budget` (n, prompt tokens) are the governor's action.
    Returns whether the batch holds anything. Nothing is admitted in an iteration that had to preempt.
    """
    batch = state.batches[i]
    preemptions = state.totals[i].preemptions
    prompt_tokens = token_budget
    apart = state.limits[i].prefill >= FIRST
    if apart and _prompts_alone(state, i, token_budget):
        _leave_decodes_out(batch)
    else:
        _plan_decodes(state, i, candidates)
        if apart:
            prompt_tokens = 0
    _plan_prefills(state, i, prompt_tokens, state.totals[i].preemptions == preemptions)
    batch.candidates = candidates
    batch.token_budget = token_budget
    return batch.num_decodes + batch.num_prefills > 0


@kernel
def _record_gap(state, i, gap, count):
    """Add `count` gaps of `gap` seconds to the ITL histogram."""
    position = int(math.log(max(gap, ITL_LOWEST_S) / ITL_LOWEST_S) * ITL_BINS_PER_E)
    state.itl[i, min(position, ITL_BINS - 1)] += count


@kernel
def _finish(state, i, request):
    instance = state.instances[i]
    totals = state.totals[i]
    request.phase = FINISHED
    give_back(state, i, request)
    instance.kv_tokens -= request.computed
    instance.tpot_weight -= weight_of(request)
    totals.finished += 1
    totals.finished_tokens += request.generated


@kernel
def _commit_decodes(state, i, previous_end):
    """Emit accepted + 1 tokens for every decode of the batch; returns how many tokens were emitted."""
    instance = state.instances[i]
    totals = state.totals[i]
    num_decodes = state.batches[i].num_decodes
    end = instance.now
    usual_gap = end - previous_end
    usual = 0
    emitted_sum = 0
    drafted_sum = 0
    deepest = totals.deepest
    for slot in range(num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        drafted = state.batch_tokens[i, slot] - 1
        accepted = state.accepted[i, slot]
        depth = min(accepted, MAX_CANDIDATES)
        deepest = max(deepest, depth)
        rejected = accepted < state.reach[i, slot]
        if rejected:
            state.stopped[i, depth] += 1
        else:
            state.exhausted[i, depth] += 1
        emitted = accepted + 1
        request.generated += emitted
        request.computed += emitted
        request.drafted += drafted
        request.accepted += accepted
        request.rejections += rejected
        if request.last_token == previous_end:
            usual += 1
            gap = usual_gap
        else:
            gap = end - request.last_token
            _record_gap(state, i, gap, 1)
        if gap > request.max_itl:
            request.max_itl = gap
        request.last_token = end
        emitted_sum += emitted
        drafted_sum += drafted
        if request.generated >= request.output:
            _finish(state, i, request)
    if usual > 0:
        _record_gap(state, i, usual_gap, usual)
    instance.kv_tokens += emitted_sum
    totals.deepest = deepest
    totals.drafted += drafted_sum
    totals.accepted += emitted_sum - num_decodes
    totals.decode_steps += num_decodes
    return emitted_sum


@kernel
def _commit_prefills(state, i):
    """Store the chunks; a request whose context is complete emits one token. Returns how many tokens were emitted."""
    instance = state.instances[i]
    batch = state.batches[i]
    end = instance.now
    emitted = 0
    for slot in range(batch.num_decodes, batch.num_decodes + batch.num_prefills):
        r = state.batch_request[i, slot]
        request = state.requests[r]
        request.computed += state.batch_tokens[i, slot]
        if request.computed < request.context:
            continue
        emitted += 1
        request.generated += 1
        request.phase = DECODING
        instance.kv_tokens += request.computed
        if math.isnan(request.first_token):
            first_token_out(state, i, r)
        else:
            gap = end - request.last_token
            _record_gap(state, i, gap, 1)
            request.max_itl = max(request.max_itl, gap)
        request.last_token = end
        if request.generated >= request.output:
            _finish(state, i, request)
    return emitted


@kernel
def commit(state, i, elapsed):
    """Close the planned iteration after `elapsed` seconds: emit tokens, finish requests, free their blocks.

    `state.accepted[i, k]` holds, for the k-th decode of the batch, how many of its candidates were accepted; if they
    were no chain, `state.reach[i, k]` holds one more where others were verified behind them, or the drafter ran out of
    proposals there, and as many where not.
    """
    instance = state.instances[i]
    batch = state.batches[i]
    totals = state.totals[i]
    previous_end = instance.last_end
    finished = totals.finished
    advance_clock(state, i, instance.now + elapsed)
    instance.last_end = instance.now
    emitted = _commit_decodes(state, i, previous_end) if batch.num_decodes > 0 else 0
    completed = batch.prompts_completed
    if batch.num_prefills > 0:
        emitted += _commit_prefills(state, i)
        instance.waiting_tokens -= batch.prefill_tokens
    if completed > 0 or totals.finished > finished:
        drop_finished(state, i)
    batch.emitted_tokens = emitted
    batch.elapsed = elapsed
    totals.emitted_tokens += emitted
    totals.iterations += 1
    totals.batched_requests += batch.num_decodes + batch.num_prefills
    totals.busy_s += elapsed
