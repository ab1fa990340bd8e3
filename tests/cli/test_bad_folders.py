"""Bad model folders, run folders and adapters: one message that names the cause, exit code 2, and nothing lost."""

import json
import struct
from pathlib import Path

import pytest


def without_tensor(data: bytes, name: str) -> bytes:
    """A safetensors file whose header calls one tensor by another name."""
    renamed = name[:-1] + "?"
    return data.replace(name.encode(), renamed.encode())


def nan_at_the_end(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<f", float("nan"))


def misses_a_shard(place) -> list[object]:
    folder = place.model("model.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return place.run(model=folder)


def pickle_only(place) -> list[object]:
    folder = place.model("model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return place.run(model=folder)


def cut_adapter(place) -> Path:
    folder = place.adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    return folder


def foreign_notes(place) -> list[object]:
    place.file("out/run.json", "{broken")
    return place.run()


def foreign_report(place) -> list[object]:
    place.file("out/report.json", '{"title": "quarterly"}')
    return place.run()


def model_in_the_output_folder(place) -> list[object]:
    place.file("out/model/model.safetensors", "mine")
    return place.run()


# Name of a case: the command it gives, words that the message must hold.
MODEL = {
    "unknown preset": (lambda p: p.run(model="lama-70b"), ("lama-70b", "llama-70b")),
    "no such folder": (lambda p: p.run(model=p.root / "nowhere"), ("nowhere", "--model")),
    "file for a folder": (lambda p: p.run(model=p.file("m.safetensors", b"")), ("m.safetensors", "not a model folder")),
    "folder without config": (lambda p: p.run(model=p.model("config.json")), ("config.json is missing",)),
    "folder without weights": (lambda p: p.run(model=p.model("*.safetensors")), ("neither model.safetensors",)),
    "folder without tokenizer": (lambda p: p.run(model=p.model("tokenizer*")), ("tokenizer.json",)),
    "adapter for a model": (lambda p: p.run(model=p.finished / "adapter"), ("adapter, not a model", "--model")),
    "broken config": (
        lambda p: p.run(model=(p.model() / "config.json").write_text("{") and p.root / "model"),
        ("config.json", "damaged"),
    ),
    "mixture of experts": (lambda p: p.run(model=p.model(num_experts=8)), ("mixture of experts", "dense")),
    "unknown family": (lambda p: p.run(model=p.model(model_type="mamba")), ("mamba", "llama")),
    "impossible sizes": (lambda p: p.run(model=p.model(num_hidden_layers=0)), ("num_hidden_layers", "config")),
    "config of another model": (lambda p: p.run(model=p.model(intermediate_size=96)), ("shape", "config.json")),
    "truncated weights": (lambda p: p.run(model=p.weights(lambda data: data[:-100])), ("model.safetensors", "cut off")),
    "web page for weights": (lambda p: p.run(model=p.weights(lambda data: b"<!DOCTYPE html>")), ("web page",)),
    "pickle only": (pickle_only, ("pickle", "pytorch_model.bin", "safetensors")),
    "missing shard": (misses_a_shard, ("model-00001-of-00002.safetensors",)),
    "missing tensor": (
        lambda p: p.run(model=p.weights(lambda data: without_tensor(data, "model.norm.weight"))),
        ("no tensor model.norm.weight",),
    ),
    "NaN in the weights": (lambda p: p.run(model=p.weights(nan_at_the_end)), ("NaN", "damaged")),
    "quantised by another method": (
        lambda p: p.run(model=p.model(quantization_config={"quant_method": "gptq", "bits": 4})),
        ("gptq",),
    ),
    "preset without its weights": (
        lambda p: p.run(model="llama-70b", gpu_mem="20G"),
        ("Llama-3.1-70B", "hf auth login", "--model FOLDER", "--weights synthetic"),
    ),
    "hub id, offline": (lambda p: p.run(model="someone/nothing"), ("someone/nothing", "network")),
    "bad model before a small budget": (lambda p: p.run(model="llama-70b", gpu_mem="1M"), ("llama-3.1-70b",)),
}
FOLDERS = {
    "output that is a file": (lambda p: p.run(o=None, output_dir=p.file("f", "x")), ("/f cannot be made", "-o")),
    "output below a file": (lambda p: p.run(o=None, output_dir=p.file("f", "x") / "out"), ("cannot be made", "-o")),
    "output where nothing can be made": (
        lambda p: p.run(o=None, output_dir="/proc/effitrain"),
        ("cannot be", "-o"),
    ),
    "output of another recipe": (
        lambda p: p.run(o=None, output_dir=p.finished, seed=3),
        ("another recipe: --seed 42 -> 3.", "-o"),
    ),
    "a mistyped model in the folder of a run": (
        lambda p: p.run(o=None, output_dir=p.finished, model="lama-70b"),
        ("no folder 'lama-70b'", "llama-70b"),
    ),
    "a mistyped data set in the folder of a run": (
        lambda p: p.run(o=None, output_dir=p.finished, dataset="nowhere.jsonl"),
        ("nowhere.jsonl",),
    ),
    "a finished run made longer": (
        lambda p: p.run(o=None, output_dir=p.finished, max_steps=40, lora_targets="q_proj,v_proj"),
        ("--max-steps 2 -> 40, --lora-targets auto -> q_proj,v_proj.", "-o", "--init-adapter"),
    ),
    "damaged notes of a run": (foreign_notes, ("run.json",)),
    "report of something else": (foreign_report, ("report.json",)),
    "a model where the run would leave its own": (model_in_the_output_folder, ("model", "no run of effitrain")),
    "resume from nothing": (lambda p: p.run(resume=p.root / "step-9"), ("step-9", "not a checkpoint")),
    "resume from no checkpoint": (lambda p: p.run(resume=p.finished), ("not a checkpoint",)),
    "resume from another shape": (
        lambda p: p.run(resume=p.finished / "checkpoints" / "step-2", lora_r=8),
        ("step-2", "other trainable tensors", "adapter.A", "--init-adapter"),
    ),
    "resume from beyond the end": (
        lambda p: p.run(resume=p.finished / "checkpoints" / "step-2", max_steps=1),
        ("step-2", "--max-steps"),
    ),
    "eval without adapter": (
        lambda p: p.with_adapter("eval", p.root / "none", "--dataset", p.asked["--dataset"]),
        ("no adapter in", "no such folder"),
    ),
    "eval with half an adapter": (
        lambda p: p.with_adapter("eval", cut_adapter(p), "--dataset", p.asked["--dataset"]),
        ("adapter", "damaged"),
    ),
    "chat with a foreign adapter": (
        lambda p: p.with_adapter("chat", p.adapter(peft_type="IA3"), "--prompt", "a"),
        ("IA3", "LoRA"),
    ),
    "adapter config without rank": (
        lambda p: p.with_adapter("export", p.adapter(r=None), "-o", p.root / "out"),
        ("r or lora_alpha is missing",),
    ),
    "eval with the adapter of another model": (
        lambda p: ["eval", "--model", p.model(num_hidden_layers=1), "--adapter", p.finished],
        ("model.layers.1.", "no such linear", "another model", "Name the model it was trained on: "),
    ),
    "chat with the adapter of another model": (
        lambda p: ["chat", "--model", p.model(intermediate_size=96), "--adapter", p.finished, "--prompt", "a"],
        ("another model", "Name the model it was trained on: "),
    ),
    "small model that is none": (
        lambda p: p.run(fit="prune", prune_ratio=0.5, small_model=p.root / "none"),
        ("no keep map", "Name keep.safetensors"),
    ),
    "adapter of another model": (
        lambda p: ["export", "--model", p.model(intermediate_size=96), "--adapter", p.finished, "-o", p.root / "out"],
        ("another model", "Name the model it was trained on: "),
    ),
    "a missing adapter exported over something": (
        lambda p: p.with_adapter("export", p.root / "none", "-o", p.file("there/x", "x").parent),
        ("no adapter in",),
    ),
    "export over something": (
        lambda p: p.with_adapter("export", p.finished, "-o", p.file("there/x", "x").parent),
        ("exists already", "-o"),
    ),
    "first adapter in an empty folder": (
        lambda p: p.run(init_adapter=p.file("empty/x", "").unlink() or p.root / "empty"),
        ("no adapter in", "on disk: nothing", "run folder"),
    ),
    "first adapter that is missing": (lambda p: p.run(init_adapter=p.root / "none"), ("no adapter in",)),
    "first adapter of another rank": (lambda p: p.run(init_adapter=p.finished, lora_r=8), ("--lora-r 4",)),
    "prompt too long": (
        lambda p: ["chat", "--model", p.asked["--model"], "--prompt", "word " * 200],
        ("tokens", "512"),
    ),
    "loss that is no number": (lambda p: p.run(lr=1e30), ("step 2", "--lr")),
}


@pytest.mark.parametrize("case", MODEL)
def test_bad_model(refused, place, case):
    make, words = MODEL[case]
    refused(make(place), words)


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_folder(refused, place, case):
    make, words = FOLDERS[case]
    refused(make(place), words)


@pytest.mark.parametrize("case", [(MODEL, "folder without tokenizer"), (FOLDERS, "output where nothing can be made")])
def test_what_can_be_told_at_once_is_told_before_the_plan(refused, place, case):
    cases, name = case
    assert "Peak" not in refused(*[part(place) if callable(part) else part for part in cases[name]]).out
