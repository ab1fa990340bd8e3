"""Streamed runs end in the bytes of resident ones: resumed, from memory and from disk; eval and chat too."""

import json
import os
import signal
from pathlib import Path

import pytest

from effitrain import api
from effitrain.core.errors import Interrupted
from effitrain.planning import plan, recipe

STEPS = 6


@pytest.fixture
def asked(tiny_model, counting, tmp_path):
    """``asked(name, **fields)``: a recipe for a run in a folder of this name."""

    def make(name, **fields):
        common = {
            "model": str(tiny_model("llama", layers=4)), "dataset": str(counting), "max_steps": STEPS, "batch_size": 2,
            "grad_accum": 2, "max_seq_len": 96, "lr": 5e-3, "lora_r": 4, "lora_dropout": 0.1, "recompute": "layer",
            "offload_activations": "off", "dtype": "fp32",
        }  # fmt: skip
        return recipe(**{**common, **fields}, output_dir=str(tmp_path / name))

    return make


def result(asked):
    """The adapter, and the loss of every step."""
    folder = Path(asked.output_dir)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (folder / "adapter/adapter_model.safetensors").read_bytes(), [line["loss"] for line in metrics]


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_run_eval_and_chat(asked, quant):
    fields = {"quant": quant, "eval_dataset": asked("unused").dataset}
    resident, stream = asked("resident", fit="resident", **fields), asked("stream", fit="stream", resident_layers=0,
                                                                          **fields)  # fmt: skip
    whole, streamed = api.run(resident), api.run(stream)
    assert result(stream) == result(resident)
    assert streamed.loss == whole.loss and (whole.stream, streamed.fit) == (None, "stream")
    figures = streamed.stream
    assert (figures["streamed_layers"], figures["resident_layers"]) == (4, 0)
    # Warm from the evaluation, a step of 2 micro-batches copies at least 4 (4 - 3) layers and never all 16.
    assert 4 * STEPS <= figures["copies"] <= 4 * STEPS + 4
    assert figures["bytes_copied"] % figures["copies"] == 0
    assert figures["copies"] == figures["copies_planned"] and figures["layers_copied_back"] == 0
    assert figures["allocations_in_steady_state"] is None  # counted on a card
    assert len(list((Path(os.environ["XDG_CACHE_HOME"]) / "effitrain/stores").iterdir())) == 1
    scores = [api.evaluate(made, stream.output_dir) for made in (resident, stream)]
    assert scores[0] == {**scores[1], "model": scores[0]["model"]}
    # The run scored the same rows in micro-batches of two as well, in another order: sums in fp32 may differ in a bit.
    assert scores[0]["loss"] == pytest.approx(streamed.loss.eval_after, rel=1e-6)
    answers = [list(api.chat(made, stream.output_dir).answer([{"role": "user", "content": "Count"}], 8))
               for made in (resident, stream)]  # fmt: skip
    assert answers[0] == answers[1]


def test_eval_and_chat_take_the_flags_of_streaming(effitrain, tiny_model, counting, tmp_path):
    model = ("--model", tiny_model("llama", layers=4))
    data, few = (*model, "--dataset", counting, "--json"), ("--fit", "stream", "--resident-layers", 1)
    whole, streamed = effitrain("eval", *data, "--fit", "resident"), effitrain("eval", *data, *few)
    assert whole.code == streamed.code == 0 and whole.out == streamed.out
    asked = (*model, "--prompt", "Count", "--prompt", "Say 5", "--max-new-tokens", 4)
    assert effitrain("chat", *asked).out == effitrain("chat", *asked, *few).out
    small = effitrain("eval", *data, "--gpu-mem", "100K")
    assert small.code == 3 and "the budget is 100 KiB" in small.err and "--lora" not in small.err
    assert effitrain("eval", *data, "--fit", "prune").code == 2
    long = effitrain("chat", *model, "--prompt", "Count " * 30, "--max-seq-len", 16)
    assert long.code == 2 and "16 is the most with its answer" in long.err and "--max-seq-len, up to" in long.err


def test_layer_order_gives_the_same_bytes_with_fewer_copies(asked):
    """4 micro-batches a step: 2 (4 - 3) copies instead of 8 (4 - 3)."""
    fields = {"fit": "stream", "resident_layers": 0, "grad_accum": 4}
    orders = {order: asked(order, **fields, stream_order=order) for order in ("micro-batch", "layer")}
    copies = {order: api.run(made).stream["copies"] for order, made in orders.items()}
    assert result(orders["layer"]) == result(orders["micro-batch"])
    assert copies["layer"] <= 2 * STEPS + 4 and copies["micro-batch"] >= 8 * STEPS


def test_short_host_memory_makes_groups(asked):
    """The layer inputs of 4 micro-batches do not fit, those of 2 do: two passes a step, each 2 (4 - 3) copies."""
    fields = {"fit": "stream", "resident_layers": 0, "grad_accum": 4, "offload_activations": "on"}
    one, whole = asked("one", **fields, stream_order="micro-batch"), asked("whole", **fields, stream_order="layer")
    needed = plan(whole)
    lines = {line.what: line.bytes for line in needed.ledger}
    room = needed.host_peak_bytes - lines["streamed layers"] - lines["layer inputs, offloaded"] // 4
    short = asked("short", **fields, stream_order="layer", host_mem=room)
    assert (needed.settings.at_once, plan(short).settings.at_once) == (4, 2)
    api.run(one)
    copies = api.run(short).stream["copies"]
    assert result(short) == result(one) and 4 * STEPS <= copies <= 4 * STEPS + 4


def test_a_stopped_run_goes_on_to_the_same_bytes(asked):
    undisturbed, stopped = asked("undisturbed", fit="stream"), asked("stopped", fit="stream")

    class StopsAfterThree(api.Events):
        def step(self, record):
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    api.run(undisturbed)
    with pytest.raises(Interrupted, match="step 3"):
        api.run(stopped, StopsAfterThree())
    api.run(stopped)
    assert result(stopped) == result(undisturbed)


def test_short_host_memory_reads_from_disk(asked, tiny_model):
    """The budget lacks two layers."""
    fields = {"model": str(tiny_model("llama", layers=8)), "fit": "stream", "resident_layers": 0}
    roomy = asked("roomy", **fields)
    api.run(roomy)
    needed = plan(roomy)
    blob = next(line.bytes for line in needed.ledger if line.what == "streamed layers") // 8
    short = asked("short", **fields, host_mem=needed.host_peak_bytes - 2 * blob + 1)
    assert 0 < plan(short).settings.on_disk < 8
    loaded = []

    class Counts(api.Events):
        def loaded(self, part, layers):
            loaded.append(part)

    api.run(short, Counts())
    assert sorted(loaded) == [f"model.layers.{layer}" for layer in range(8)]
    assert result(short) == result(roomy)


def test_synthetic_weights_stream_and_leave_nothing_on_disk(asked):
    made = asked("synthetic", fit="stream", model="tiny", weights="synthetic")
    api.run(made)
    whole = asked("resident", fit="resident", model="tiny", weights="synthetic")
    api.run(whole)
    assert result(made) == result(whole)
    assert not (Path(os.environ["XDG_CACHE_HOME"]) / "effitrain/stores").exists()


def test_store_ls_verify_rm(effitrain, asked):
    stream = asked("stream", fit="stream", max_steps=1)
    api.run(stream)
    (folder,) = (Path(os.environ["XDG_CACHE_HOME"]) / "effitrain/stores").iterdir()
    assert folder.name in effitrain("store", "ls").out
    assert f"{folder.name}: as it was written" in effitrain("store", "verify").out
    path = folder / "layers/002.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    answer = effitrain("store", "verify", folder.name)
    assert answer.code == 2 and "002.bin" in answer.err
    answer = effitrain("store", "rm", "../stores")
    assert answer.code == 2 and folder.name in answer.err and folder.exists()
    assert effitrain("store", "rm", folder.name).code == 0 and not folder.exists()
    assert effitrain("store", "ls").out.startswith("0 in ")
