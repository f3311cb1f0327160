"""The scheduler: release, plan, commit. Every backend runs these same compiled functions.

One iteration is `release` (arrivals up to the clock join the queue), `plan` (who gets how many tokens), the backend's
work, and `commit` (tokens are emitted at the iteration's end). Queue discipline is first come, first served, with two
consequences that keep the code small: the running list is in order of arrival with the decoding requests first, and at
most its last request is in the middle of its prompt when an iteration begins.

Order of service, admission of whole prompts against a watermark, and preemption of the latest arrival by recompute
follow vLLM (Kwon et al., SOSP 2023, section 4.5); the prompt-token budget follows Sarathi-Serve (Agrawal et al.,
OSDI 2024, section 4), except that it counts prompt tokens only. An engine's `prefill` says how n prompt tokens meet the
decodes; all but the first are the baselines of that paper:

- chunked: decodes run in every iteration, prompts beside them, cut into chunks that fill n (its stall-free batching).
- whole: as before, but no prompt is cut (Orca; its "hybrid-batching-only"). A prompt starts in an iteration when it
  fits what is left of n there; the first one always may.
- first: whole prompts alone while one can be admitted, decodes alone otherwise (vLLM before chunked prefill).
- turns: chunks alone and decodes alone, in turns while there are both (its "chunked-prefills-only").
"""

import math

import numpy as np

from engine.compiled import kernel
from engine.core.blocks import blocks_for, give_back, take
from engine.core.state import (
    CANCELLED,
    DECODING,
    FINISHED,
    FIRST,
    ITL_BINS,
    ITL_BINS_PER_E,
    ITL_LOWEST_S,
    MAX_CANDIDATES,
    PREEMPTED,
    PREFILLING,
    TURNS,
    WHOLE,
)

NOBODY = np.int32(-1)


@kernel
def advance_clock(state, e, to):
    """Move the clock to `to` (s) and charge the time between to the requests that live through it.

    Between its first and last token a request pays 1 / (output - 1) per second, so that the integral over its life is
    its TPOT; past its deadline and without a first token it pays one second of lateness per second.
    """
    engine = state.engines[e]
    elapsed = to - engine.now
    # The weights of requests that came and went leave rounding behind, which may be below zero.
    engine.tpot_cost += max(engine.tpot_weight, 0.0) * elapsed
    engine.lateness += engine.overdue * elapsed
    while engine.next_deadline < engine.num_requests:
        request = state.requests[e, engine.next_deadline]
        deadline = request.arrival + engine.ttft_target
        if not deadline < to:
            break
        if math.isnan(request.first_token) and request.phase != CANCELLED:
            engine.overdue += 1
            engine.violations += 1
            engine.lateness += to - deadline
        engine.next_deadline += 1
    engine.now = to


@kernel
def skip_cancelled(state, e):
    """Move the head of the queue past requests that were cancelled while they waited."""
    engine = state.engines[e]
    while engine.next_new < engine.released and state.requests[e, engine.next_new].phase == CANCELLED:
        engine.next_new += 1
        engine.cancelled_waiting -= 1


@kernel
def release(state, e):
    """Let every request that has arrived by the clock join the queue."""
    engine = state.engines[e]
    while engine.released < engine.num_requests:
        request = state.requests[e, engine.released]
        if request.arrival > engine.now:
            break
        engine.released += 1
        if request.phase == CANCELLED:
            engine.cancelled_waiting += 1
            continue
        engine.waiting_tokens += request.prompt
        engine.seen_arrivals += 1
        engine.seen_arrived_tokens += request.prompt
    if engine.cancelled_waiting > 0:
        skip_cancelled(state, e)


@kernel
def has_work(state, e):
    """Whether any released request is unfinished."""
    engine = state.engines[e]
    return engine.num_running > 0 or engine.num_preempted > 0 or engine.next_new < engine.released


@kernel
def arrive(state, e, now):
    """Move the clock to `now` and let who has arrived join the queue; returns `has_work`."""
    advance_clock(state, e, now)
    release(state, e)
    return has_work(state, e)


@kernel
def preempt_latest(state, e):
    """Take the blocks of the running request that arrived last; it recomputes its context when it returns."""
    engine = state.engines[e]
    engine.num_running -= 1
    r = state.running[e, engine.num_running]
    request = state.requests[e, r]
    if request.phase == DECODING:
        engine.num_decoding -= 1
        engine.kv_tokens -= request.computed
        remaining = 0
    else:
        remaining = request.context - request.computed
    request.context = np.int32(request.prompt + request.generated)
    engine.waiting_tokens += request.context - remaining
    request.computed = np.int32(0)
    request.phase = np.int32(PREEMPTED)
    request.preemptions = np.int32(request.preemptions + 1)
    give_back(engine, request)
    state.preempted[e, engine.num_preempted] = r
    engine.num_preempted += 1
    engine.preemptions += 1
    engine.seen_preemptions += 1


@kernel
def _secure_one_slot_each(state, e):
    """Give every decoding request, earliest first, a slot for its next token, preempting from the back."""
    engine = state.engines[e]
    i = 0
    while i < engine.num_decoding:
        request = state.requests[e, state.running[e, i]]
        if request.blocks * engine.block_size <= request.computed:
            while engine.free_blocks == 0 and i < engine.num_running:
                preempt_latest(state, e)
            if i >= engine.num_decoding:
                break
            take(engine, request, 1)
        i += 1


@kernel
def _plan_decodes(state, e, candidates):
    """Give each decoding request 1 + c_i tokens; c_i is cut by c, by its output limit and by the free KV blocks."""
    engine = state.engines[e]
    block_size = engine.block_size
    widest = (candidates + block_size) // block_size
    if engine.free_blocks < engine.num_decoding * widest:
        _secure_one_slot_each(state, e)
    num_decodes = engine.num_decoding
    decode_tokens = 0
    steps = 0
    for i in range(num_decodes):
        r = state.running[e, i]
        request = state.requests[e, r]
        tokens = min(1 + candidates, request.output - request.generated)
        if request.computed + tokens > request.blocks * block_size:
            missing = blocks_for(request.computed + tokens, block_size) - request.blocks
            if missing > engine.free_blocks:
                missing = engine.free_blocks
                tokens = min(tokens, (request.blocks + missing) * block_size - request.computed)
            take(engine, request, missing)
        state.batch_request[e, i] = r
        state.batch_tokens[e, i] = tokens
        state.reach[e, i] = tokens - 1
        decode_tokens += tokens
        steps = max(steps, tokens - 1)
    engine.num_decodes = num_decodes
    engine.decode_tokens = decode_tokens
    engine.decode_kv_tokens = engine.kv_tokens
    engine.candidate_steps = steps


@kernel
def _leave_decodes_out(engine):
    """Plan no decode."""
    engine.num_decodes = 0
    engine.decode_tokens = 0
    engine.decode_kv_tokens = 0
    engine.candidate_steps = 0


@kernel
def _next_to_admit(state, e):
    """The request at the head of the queue if it fits (whole context, watermark kept free), else NOBODY."""
    engine = state.engines[e]
    if engine.num_running >= engine.max_num_seqs:
        return NOBODY
    if engine.num_preempted > 0:
        r = state.preempted[e, engine.num_preempted - 1]
    else:
        if engine.next_new >= engine.released:
            return NOBODY
        r = np.int32(engine.next_new)
    reserve = engine.watermark_blocks if engine.num_running > 0 else 0
    if blocks_for(state.requests[e, r].context, engine.block_size) + reserve > engine.free_blocks:
        return NOBODY
    return r


@kernel
def _admit(state, e, r):
    """Let request `r`, the head of the queue, in: it gets the blocks of its whole context."""
    engine = state.engines[e]
    request = state.requests[e, r]
    if engine.num_preempted > 0:
        engine.num_preempted -= 1
    else:
        engine.next_new += 1
        request.admitted = engine.now
        if engine.cancelled_waiting > 0:
            skip_cancelled(state, e)
    take(engine, request, blocks_for(request.context, engine.block_size))
    request.phase = np.int32(PREFILLING)
    state.running[e, engine.num_running] = r
    engine.num_running += 1


@kernel
def _plan_prefills(state, e, token_budget, may_admit):
    """Share `token_budget` prompt tokens, first come first served; new requests enter while they fit."""
    engine = state.engines[e]
    whole = engine.prefill in (WHOLE, FIRST)
    slot = engine.num_decodes
    position = engine.num_decoding
    left = token_budget
    completed = 0
    while left > 0:
        if position == engine.num_running:
            if not may_admit:
                break
            head = _next_to_admit(state, e)
            if head == NOBODY:
                break
            if whole and slot > engine.num_decodes and state.requests[e, head].context > left:
                break
            _admit(state, e, head)
        r = state.running[e, position]
        request = state.requests[e, r]
        remaining = request.context - request.computed
        chunk = remaining if whole else min(left, remaining)
        state.batch_request[e, slot] = r
        state.batch_tokens[e, slot] = chunk
        completed += chunk == remaining
        left -= chunk
        slot += 1
        position += 1
    engine.num_prefills = slot - engine.num_decodes
    engine.prefill_tokens = token_budget - left
    engine.prompts_completed = completed


@kernel
def _prompts_alone(state, e, token_budget):
    """Whether the next batch of an engine that keeps prompts and decodes apart is one of prompts."""
    engine = state.engines[e]
    if token_budget <= 0:
        return False
    if engine.prefill == TURNS and engine.num_prefills > 0 and engine.num_decoding > 0:
        return False
    return engine.num_running > engine.num_decoding or _next_to_admit(state, e) != NOBODY


@kernel
def plan(state, e, candidates, token_budget):
    """Choose the next batch of engine `e` and write it to `batch_request` / `batch_tokens`, decodes first.

    `candidates` (c, tokens per decoding request) and `token_budget` (n, prompt tokens) are the governor's action.
    Returns whether the batch holds anything. Nothing is admitted in an iteration that had to preempt.
    """
    engine = state.engines[e]
    preemptions = engine.preemptions
    prompt_tokens = token_budget
    if engine.prefill >= FIRST and _prompts_alone(state, e, token_budget):
        _leave_decodes_out(engine)
    else:
        _plan_decodes(state, e, candidates)
        if engine.prefill >= FIRST:
            prompt_tokens = 0
    _plan_prefills(state, e, prompt_tokens, engine.preemptions == preemptions)
    engine.last_candidates = candidates
    engine.last_budget = token_budget
    return engine.num_decodes + engine.num_prefills > 0


@kernel
def _record_gap(state, e, gap, count):
    """Add `count` gaps of `gap` seconds to the ITL histogram."""
    position = int(math.log(max(gap, ITL_LOWEST_S) / ITL_LOWEST_S) * ITL_BINS_PER_E)
    state.itl[e, min(position, ITL_BINS - 1)] += count


@kernel
def _finish(engine, request):
    request.phase = np.int32(FINISHED)
    give_back(engine, request)
    engine.kv_tokens -= request.computed
    engine.num_finished += 1
    engine.seen_finished += 1
    engine.seen_finished_tokens += request.generated
    if request.output > 1:
        engine.tpot_weight -= 1.0 / (request.output - 1)


@kernel
def _commit_decodes(state, e, previous_end):
    """Emit accepted + 1 tokens for every decode of the batch; returns how many tokens were emitted."""
    engine = state.engines[e]
    end = engine.now
    usual_gap = end - previous_end
    usual = 0
    emitted_sum = 0
    drafted_sum = 0
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        drafted = state.batch_tokens[e, i] - 1
        accepted = state.accepted[e, i]
        depth = min(accepted, MAX_CANDIDATES)
        rejected = accepted < state.reach[e, i]
        if rejected:
            state.stopped[e, depth] += 1
        else:
            state.exhausted[e, depth] += 1
        emitted = accepted + 1
        request.generated = np.int32(request.generated + emitted)
        request.computed = np.int32(request.computed + emitted)
        request.drafted = np.int32(request.drafted + drafted)
        request.accepted = np.int32(request.accepted + accepted)
        request.rejections = np.int32(request.rejections + rejected)
        if request.last_token == previous_end:
            usual += 1
            gap = usual_gap
        else:
            gap = end - request.last_token
            _record_gap(state, e, gap, 1)
        if gap > request.max_itl:
            request.max_itl = gap
        request.last_token = end
        emitted_sum += emitted
        drafted_sum += drafted
        if request.generated >= request.output:
            _finish(engine, request)
    if usual > 0:
        _record_gap(state, e, usual_gap, usual)
    engine.kv_tokens += emitted_sum
    engine.total_drafted += drafted_sum
    engine.total_accepted += emitted_sum - engine.num_decodes
    engine.total_decode_steps += engine.num_decodes
    return emitted_sum


@kernel
def _commit_prefills(state, e):
    """Store the chunks; a request whose context is complete emits one token. Returns how many tokens were emitted."""
    engine = state.engines[e]
    end = engine.now
    emitted = 0
    for i in range(engine.num_decodes, engine.num_decodes + engine.num_prefills):
        r = state.batch_request[e, i]
        request = state.requests[e, r]
        request.computed = np.int32(request.computed + state.batch_tokens[e, i])
        if request.computed < request.context:
            continue
        emitted += 1
        request.generated = np.int32(request.generated + 1)
        request.phase = np.int32(DECODING)
        engine.kv_tokens += request.computed
        if math.isnan(request.first_token):
            request.first_token = end
            if r < engine.next_deadline:
                engine.overdue -= 1
            if request.output > 1:
                engine.tpot_weight += 1.0 / (request.output - 1)
        else:
            gap = end - request.last_token
            _record_gap(state, e, gap, 1)
            request.max_itl = max(request.max_itl, gap)
        request.last_token = end
        if request.generated >= request.output:
            _finish(engine, request)
    return emitted


@kernel
def drop_finished(state, e):
    """Close the gaps that requests which are done leave in the running list; order is kept."""
    engine = state.engines[e]
    kept = 0
    decoding = 0
    for i in range(engine.num_running):
        r = state.running[e, i]
        phase = state.requests[e, r].phase
        if phase in (DECODING, PREFILLING):
            state.running[e, kept] = r
            kept += 1
            decoding += phase == DECODING
    engine.num_running = kept
    engine.num_decoding = decoding


@kernel
def commit(state, e, elapsed):
    """Close the planned iteration after `elapsed` seconds: emit tokens, finish requests, free their blocks.

    `state.accepted[e, i]` holds, for the i-th decode of the batch, how many of its candidates were accepted; if they
    were no chain, `state.reach[e, i]` holds one more where others were verified behind them, or the drafter ran out of
    proposals there, and as many where not.
    """
    engine = state.engines[e]
    previous_end = engine.last_end
    finished = engine.num_finished
    advance_clock(state, e, engine.now + elapsed)
    engine.last_end = engine.now
    emitted = _commit_decodes(state, e, previous_end) if engine.num_decodes > 0 else 0
    completed = engine.prompts_completed
    if engine.num_prefills > 0:
        emitted += _commit_prefills(state, e)
        engine.waiting_tokens -= engine.prefill_tokens
    if completed > 0 or engine.num_finished > finished:
        drop_finished(state, e)
    engine.emitted_tokens = emitted
    engine.total_emitted += emitted
    engine.seen_emitted += emitted
    engine.iterations += 1
    engine.seen_iterations += 1
    engine.batched_requests += engine.num_decodes + engine.num_prefills
    engine.busy_s += elapsed
    engine.last_elapsed = elapsed
