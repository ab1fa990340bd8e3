"""The mistakes that others made and that were known when this was designed: a check of the doctor watches each on the
user's machine, or tests that CI runs do.
"""

import importlib
import sys
from pathlib import Path

import pytest

from effitrain.evals import doctor
from effitrain.evals.trials import TRIALS

SCRIPTS = Path(__file__).parents[2] / "scripts"
# By trap: checks of the doctor, tests that CI runs.
TRAPS: dict[str, tuple[list[str], list[str]]] = {
    "4-bit autograd that keeps a reused buffer's weight reads another layer in backward": (
        ["streamed gradients"],
        [
            "stream/test_streamer.py::test_random_models_placements_and_delays",
            "quant/test_linear.py::test_nothing_is_kept_for_backward",
            "quant/test_linear.py::test_backward_asks_for_the_weight_again",
        ],
    ),
    "a 4-bit linear of a CPU that repacks its weight in eval mode cannot train afterwards": (
        ["training after evaluation", "NF4 on cpu", "NF4 on cuda"],
        ["quant/test_linear.py::test_output_and_gradient"],
    ),
    "preparing a 4-bit model for training upcasts embedding and head to fp32": (
        ["precision of frozen weights"],
        ["train/test_proof.py::test_no_logits_of_all_tokens_and_no_fp32_copy_of_a_frozen_tensor"],
    ),
    "merging or requantising into NF4 throws a small update away": (
        ["merged update"],
        [
            "end_to_end/test_verbs.py::test_export_merged_loads_in_stock_transformers",
            "train/test_lisa.py::test_quantised_layers_stay_as_they_are_until_their_turn_and_never_come_back",
        ],
    ),
    "layer sampling that never frees its states, and layers that never train": (
        [],
        [
            "train/test_lisa.py::test_bytes_are_constant_over_twenty_switches_and_those_of_the_ledger",
            "train/test_lisa.py::test_a_layer_first_trained_in_round_five_moves",
        ],
    ),
    "rolled shifted attention shows the first tokens the last": (
        ["shifted attention"],
        ["kernels/test_shifted_attention.py::test_no_token_sees_a_later_one"],
    ),
    "FFN widths that are no multiple, and KV heads cut without their query heads": (
        [],
        [
            "core/test_cut.py::test_widths_are_rounded_to_the_multiple",
            "core/test_keep.py::test_a_kv_head_brings_its_rows_and_those_of_its_query_heads",
            "pruning/test_cut.py::test_cut_is_masked",
        ],
    ),
    "masks that let packed samples see each other, and labels that are all masked": (
        ["packing isolation", "end of turn"],
        [
            "model/test_decoder.py::test_perturbing_one_segment_leaves_the_others_bit_identical",
            "data/test_prepare.py::test_errors",
        ],
    ),
    "a loss that is a mean of each micro-batch": (
        ["accumulated gradients", "fused loss"],
        ["train/test_loop.py::test_one_batch_of_eight_is_eight_of_one"],
    ),
    "allocation in the copy loop, and pinned memory rounded up to powers of two": (
        ["pinned memory"],
        ["stream/test_memory.py::test_no_storage_is_made_in_steady_state"],
    ),
}


@pytest.fixture
def must_run(monkeypatch):
    """The function of the results page that sees that CI runs a test."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield importlib.import_module("study.promises").must_run
    for name in [name for name in sys.modules if name.partition(".")[0] == "study"]:
        del sys.modules[name]


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_watched(must_run, trap):
    checks, tests = TRAPS[trap]
    assert {*checks} <= {*TRIALS, *dict(doctor.of_the_machine())} and tests
    for test in tests:
        must_run(test)


def test_the_ten_traps_of_the_design():
    assert len(TRAPS) == 10 and sum(bool(checks) for checks, _ in TRAPS.values()) == 8


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("quant/test_linear.py::test_nothing", "has no test"),
        ("quant/test_nothing.py::test_nothing", "there is no"),
        ("end_to_end/test_matrix.py::test_all_other_cells", "is marked slow"),
        ("quant/test_gpu_linear.py::test_nothing_is_kept_for_backward", "is marked gpu"),
        ("io/test_synthetic.py::test_same_bytes_on_cuda", "is marked gpu, skipif"),
    ],
)
def test_a_test_that_ci_does_not_run_is_no_proof(must_run, test, why):
    with pytest.raises(ValueError, match=why):
        must_run(test)
