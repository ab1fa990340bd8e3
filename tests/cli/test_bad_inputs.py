"""Bad usage, bad data, budgets too small: one message that names the cause, exit code 2 or 3, nothing half-written."""

import json
import subprocess
import sys

import pytest

from .conftest import foreign_flags

GOOD = '{"prompt": "a", "completion": "b"}\n'
CONFIG = "model: tiny\n"

# Name of a case: the command it gives, words that the message must hold.
USAGE = {
    "no such verb": (lambda p: ["trian"], ("trian", "`effitrain --help`")),
    "verb of other tools": (lambda p: ["train"], ("train", "mean run?")),
    "misspelt verb": (lambda p: ["exprt"], ("exprt", "mean export?")),
    "unknown flag": (lambda p: ["run", "--nonsense"], ("--nonsense",)),
    "misspelt flag": (lambda p: ["run", "--bach-size", "4"], ("--bach-size", "--batch-size")),
    "flag of other tools": (lambda p: ["run", "--learning-rate", "1"], ("--learning-rate", "mean --lr?", "--help")),
    "flag of another verb": (lambda p: ["recover", "--lora-rank", "4"], ("--lora-rank", "`effitrain recover --help`")),
    "flag of another method": (lambda p: ["run", "--lisa-layers", "3"], ("--lisa-layers", "--method lisa")),
    "flag without a value": (lambda p: ["run", "--model"], ("--model", "argument", "--help")),
    "word that is no flag": (lambda p: ["run", "llama-70b"], ("llama-70b",)),
    "export of nothing": (lambda p: ["export", "--model", "tiny"], ("--adapter",)),
    "export to no such form": (lambda p: ["export", "--adapter", "a", "--to", "onnx"], ("onnx", "merged")),
    "several bad fields": (
        lambda p: p.run(batch_size=0, lr=-1, quant="int3", epochs="many"),
        ("--batch-size", "--lr", "int3", "--epochs", "many"),
    ),
    "unknown optimizer": (lambda p: p.run(optimizer="adan"), ("--optimizer", "adan", "adamw8bit")),
    "unknown dtype": (lambda p: p.run(dtype="float16"), ("--dtype", "float16", "fp16")),
    "unknown format": (lambda p: p.run(format="chatty"), ("--format", "chatty", "sharegpt")),
    "unknown template": (lambda p: p.run(template="vicuna"), ("vicuna", "chatml")),
    "unknown method": (lambda p: p.run(method="loro"), ("--method", "loro", "lora")),
    "unknown method of a plan": (lambda p: p.run("plan", method="loro"), ("--method", "loro", "lora")),
    "unknown target": (lambda p: p.run(lora_targets="q_proj,qproj"), ("qproj", "--lora-targets", "down_proj")),
    "offload of what is kept": (
        lambda p: p.run(recompute="none", offload_activations="on"),
        ("--offload-activations on", "--recompute none"),
    ),
    "streaming without recomputation": (lambda p: p.run(fit="stream", recompute="mlp"), ("--fit stream", "mlp")),
    "ratio of what is not pruned": (lambda p: p.run(fit="resident", prune_ratio=0.5), ("--prune-ratio", "resident")),
    "ratio that is none": (lambda p: p.run(prune_ratio=1.2), ("--prune-ratio", "less than 1")),
    "exempt layers that are none": (lambda p: p.run(prune_exempt="four"), ("--prune-exempt", "4,2")),
    "size that is none": (lambda p: p.run(gpu_mem="plenty"), ("plenty", "20G")),
    "size without a unit": (lambda p: p.run(gpu_mem=20), ("--gpu-mem '20'", "is 20 bytes", "mean 20G?")),
    "size of nothing": (lambda p: p.run(host_mem="0G"), ("0G", "0 bytes", "20G")),
    "unknown card": (lambda p: p.run("plan", gpu="rtx4091"), ("rtx4091", "rtx4090")),
    "unknown card of a run": (lambda p: p.run(gpu="rtx9999"), ("Unknown card 'rtx9999'", "rtx4090", "h200")),
    "card that is not here": (lambda p: p.run(gpu="rtx4090"), ("--gpu", "--dry-run")),
    "no such recipe": (lambda p: ["run", "--config", p.root / "none.yaml"], ("none.yaml", "--config")),
    "unknown key": (
        lambda p: ["run", "--config", p.file("r.yaml", CONFIG + "bach_size: 4")],
        ("bach_size", "batch_size"),
    ),
    "broken YAML": (lambda p: ["run", "--config", p.file("r.yaml", "model: [tiny\nlr: 1")], ("r.yaml", "YAML")),
    "recipe that is a list": (lambda p: ["run", "--config", p.file("r.yaml", "- model\n")], ("r.yaml", "keys")),
    "tracker not installed": (lambda p: p.run(report_to="wandb"), ("wandb", "effitrain[track]")),
}
DATA = {
    "no such file": (lambda p: p.run(dataset=p.root / "none.jsonl"), ("none.jsonl",)),
    "empty file": (lambda p: p.on(""), ("rows.jsonl", "empty")),
    "empty list": (lambda p: p.on("[]", "rows.json"), ("rows.json", "empty")),
    "unknown kind of file": (lambda p: p.on("x", "rows.xlsx"), ("rows.xlsx", ".jsonl")),
    "empty folder": (lambda p: p.run(dataset=p.file("d/readme.md", "x").parent), ("holds no data file",)),
    "wrong column": (lambda p: p.run(columns="prompt=query,completion=completion"), ("query", "prompt")),
    "columns of no format": (lambda p: p.on('{"a": 1, "b": 2}\n'), ("a, b", "--columns")),
    "format that does not fit": (lambda p: p.run(format="sharegpt"), ("prompt", "sharegpt")),
    "broken line": (lambda p: p.on(GOOD + GOOD + '{"prompt": "a",\n'), ("rows.jsonl", "line 3")),
    "row that is no object": (lambda p: p.on(GOOD + "[1, 2]\n"), ("row 2", "list")),
    "null": (lambda p: p.on(GOOD + '{"prompt": "a", "completion": null}\n'), ("row 2", "completion", "null")),
    "NaN": (lambda p: p.on(GOOD + '{"prompt": NaN, "completion": "b"}\n'), ("row 2", "prompt", "nan")),
    "empty answer": (lambda p: p.on(GOOD * 2 + '{"prompt": "a", "completion": " "}\n'), ("row 3", "empty")),
    "list for a text": (lambda p: p.on('{"prompt": ["a"], "completion": "b"}\n'), ("row 1", "prompt")),
    "unknown speaker": (
        lambda p: p.on('{"messages": [{"role": "narrator", "content": "x"}]}\n'),
        ("row 1", "narrator", "assistant"),
    ),
    "not UTF-8": (lambda p: p.on(GOOD.encode() + b'{"prompt": "\xff"}\n'), ("rows.jsonl", "utf-8")),
    "not a list": (lambda p: p.on('{"rows": 3}', "rows.json"), ("rows.json", "list of rows")),
    "too many cells": (lambda p: p.on("prompt,completion\na,b\na,b,c\n", "rows.csv"), ("rows.csv", "row 2")),
    "not parquet": (lambda p: p.on("PAR0", "rows.parquet"), ("rows.parquet",)),
    "every answer cut off": (
        lambda p: p.on(json.dumps({"prompt": "long " * 40, "completion": "b"}), truncation="drop"),
        ("1 sample dropped, none kept", "--max-seq-len"),
    ),
    "evaluation set that is missing": (lambda p: p.run(eval_dataset=p.root / "none.json"), ("none.json",)),
    "evaluation set without tokens": (
        lambda p: p.run(eval_dataset=p.file("e.jsonl", json.dumps({"prompt": "long " * 40, "completion": "b"}))),
        ("e.jsonl", "dropped"),
    ),
    "data set of the hub, offline": (lambda p: p.run(dataset="someone/nothing"), ("someone/nothing",)),
    "bad data before a bad model": (
        lambda p: p.run(dataset=p.root / "none.csv", model=p.root / "nowhere"),
        ("none.csv",),
    ),
}
TOO_SMALL = {
    "device": (lambda p: p.run(gpu_mem="1M"), ("the budget is 1.0 MiB", "short")),
    "host": (lambda p: p.run(host_mem="64M"), ("host needs", "64.0 MiB", "short")),
    "eval": (
        lambda p: p.with_adapter("eval", p.finished, "--dataset", p.asked["--dataset"], "--gpu-mem", "99K"),
        ("the budget is 99.0 KiB",),
    ),
    "70B": (
        lambda p: p.run(model="llama-70b", weights="synthetic", gpu_mem="20G", quant="nf4", fit="resident"),
        ("the budget is 20.0 GiB", "short"),
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(refused, place, monkeypatch, case):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    make, words = USAGE[case]
    refused(make(place), words)


@pytest.mark.parametrize("group", [[], ["store"]])
def test_a_command_without_a_verb_shows_its_help(effitrain, group):
    answer = effitrain(*group)
    assert answer.code == 2 and answer.err.startswith("Usage: effitrain") and "Commands:" in answer.err


@pytest.mark.parametrize("case", DATA)
def test_bad_data(refused, place, case):
    make, words = DATA[case]
    refused(make(place), words)


@pytest.mark.parametrize("case", TOO_SMALL)
def test_a_budget_too_small(refused, place, case):
    make, words = TOO_SMALL[case]
    answer = refused(make(place), words, code=3)
    assert not [*place.root.rglob("*.json")]
    if case != "eval":
        assert "does not fit" in " ".join(answer.out.split()) and "frozen linears" in answer.out


def test_a_plan_that_does_not_fit_is_an_answer(effitrain, place):
    answer = effitrain(*place.run("plan", gpu_mem="1M"))
    shown = " ".join(answer.out.split())  # the path of the model may push the verdict into another line
    assert answer.code == 3 and "does not fit" in shown and "1.0 MiB" in shown and not answer.err
    plan = json.loads(effitrain(*place.run("plan", gpu_mem="1M"), "--json").out)
    assert plan["fits"] is False and plan["ledger"] and "short" in plan["reasons"][0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["run", "--model", "lama-70b", "--lora-rank", "4"], "--lora-r"),
        (["plan", "--model", "lama-70b"], "llama-70b"),
        (["run", "--dataset", "none.jsonl", "--max-steps", "1"], "none.jsonl"),
    ],
)
def test_as_a_real_process(tmp_path, arguments, word):
    program = [sys.executable, "-P", "-m", "effitrain", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("effitrain: ") and done.stderr.count("effitrain: ") == 1
    assert word in done.stderr and "Traceback" not in done.stderr and not [*tmp_path.rglob("*.json")]


def test_a_flag_of_another_verb_in_a_message_would_be_seen():
    assert foreign_flags("No map.\nName it with --keep.", ["run", "--model", "x"]) == ["--keep"]
    assert not foreign_flags("No map.\nUse effitrain recover --keep, or --fit.", ["run"])
    assert not foreign_flags("No such flag: --nonsense.", ["run", "--nonsense"])
