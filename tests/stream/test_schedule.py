"""The schedule of copies: legal, exact in number, with every copy free to run beside the use before its own."""

import pytest

from effitrain.stream.schedule import schedule


def passes(layers, count=1, rows=1, back_to=0):
    forward = [layer for layer in layers for _ in range(rows)]
    return (forward + [layer for layer in reversed(forward) if layer >= back_to]) * count


def play(order, holds, plan):
    """Run the schedule as late as it allows; the layers in the slots afterwards."""
    holds, done = list(holds), 0
    for turn, (layer, use) in enumerate(zip(order, plan.uses, strict=True)):
        while done < use.copies:
            copy = plan.copies[done]
            assert copy.after <= turn, "the copy waits for a use that waits for it"
            assert all(other.slot != copy.slot for other in plan.uses[copy.after : turn]), "in use"
            holds[copy.slot] = copy.layer
            done += 1
        assert use.layer == layer == holds[use.slot]
    assert done == len(plan.copies)
    return tuple(holds)


@pytest.mark.parametrize("layers", [range(1), range(2), range(7), (0, 2, 5, 6, 9), range(80)])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_number_of_copies(layers, slots, micro):
    streamed, cold = len(layers), (None,) * slots
    missing = max(0, streamed - slots)
    whole = tuple(passes(layers, micro))
    plan = schedule(whole, cold)
    assert len(plan.copies) == streamed + (2 * micro - 1) * missing
    warm = play(whole, cold, plan)
    for _ in range(2):
        again = schedule(whole, warm)
        assert len(again.copies) == 2 * micro * missing
        warm = play(whole, warm, again)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_planning_pass_by_pass_copies_no_more_than_planning_a_step(slots):
    holds, copies = (None,) * slots, 0
    for _ in range(5):
        plan = schedule(tuple(passes(range(9))), holds)
        copies += len(plan.copies)
        holds = play(passes(range(9)), holds, plan)
    assert copies == len(schedule(tuple(passes(range(9), 5)), (None,) * slots).copies)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_by_layer_a_step_takes_the_copies_of_one_micro_batch(slots):
    order = tuple(passes(range(9), rows=4))
    plan = schedule(order, (None,) * slots)
    play(order, (None,) * slots, plan)
    assert len(plan.copies) == 9 + 9 - slots


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("back_to", [0, 3, 99])
def test_every_copy_has_a_use_to_hide_behind(slots, back_to):
    order, holds = tuple(passes(range(9), back_to=back_to)), (None,) * slots
    for _ in range(4):
        plan = schedule(order, holds)
        for number, copy in enumerate(plan.copies):
            turn = min(turn for turn, use in enumerate(plan.uses) if use.copies > number)
            assert copy.after < turn or turn == 0
        holds = play(order, holds, plan)


def test_forward_passes_keep_what_they_can():
    """With one pinned layer and two that rotate, a pass copies one layer less than there are."""
    holds = (None,) * 3
    counts = []
    for _ in range(4):
        plan = schedule(tuple(range(6)), holds)
        holds = play(range(6), holds, plan)
        counts.append(len(plan.copies))
    assert counts[0] == 6 and set(counts[2:]) == {5}
