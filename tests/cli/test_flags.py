"""The command line's flags: the frozen list, their spellings, recipes in YAML. What each does: ``test_every_flag``."""

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from effitrain.cli.main import VERBS
from effitrain.core.recipe import Recipe

ADAPT = "--model --weights --gpu-mem --host-mem --quant --dtype --batch-size --max-seq-len --seed --adapter --config"
DATA = (
    "--dataset --format --columns --template --train-on-prompt --no-train-on-prompt --truncation --packing --no-packing"
    " --join-documents --no-join-documents"
)
RUN = f"""
    {DATA} --config --model --weights --eval-dataset --eval-fraction --eval-every
    --output-dir -o --save-every --keep-checkpoints --resume --report-to
    --gpu-mem --host-mem --gpu --fit --prefer --resident-layers --stream-order --quant --dtype --recompute
    --offload-activations --mlp-tiles
    --prune-ratio --prune-parts --prune-exempt
    --max-seq-len --batch-size --grad-accum --lr --schedule --warmup --epochs --max-steps --seed
    --weight-decay --max-grad-norm --optimizer
    --attention --s2-group --rope-scaling --rope-factor
    --train-norms --no-train-norms --train-embeddings --no-train-embeddings
    --method --lora-r --lora-alpha --lora-dropout --lora-targets --lora-rslora --no-lora-rslora --init-adapter
    --lisa-layers --lisa-interval --lisa-sampling --lisa-state --lisa-train-embeddings --no-lisa-train-embeddings
    --prune-method
    --prune-ratio --prune-parts --prune-score --prune-ranking --prune-round --prune-exempt --align --calib-dataset
    --small-model
"""
PRUNE = "--prune-ratio --prune-parts --prune-score --prune-ranking --prune-round --prune-exempt --align --calib-dataset"
FLAGS = {
    "plan": f"{RUN} --prove --json",
    "run": f"{RUN} --prove --dry-run --json --quiet",
    "eval": f"{ADAPT} {DATA} --fit --resident-layers --by-position --passkey --json",
    "chat": f"{ADAPT} --fit --resident-layers --template --prompt --max-new-tokens --temperature",
    "prune": f"{PRUNE} {DATA} --config --model --eval-dataset --eval-fraction --seed --quant --dtype"
    " --max-seq-len --rope-scaling --rope-factor --output-dir -o",
    "recover": "--model --output-dir -o --config --adapter --keep",
    "export": "--model --output-dir -o --config --adapter --to",
    "doctor": "",
    "store": "",
    "bench": "",
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_flags_is_frozen(verb):
    """A new flag is a decision, and so is a lost one: change this list with it."""
    command = importlib.import_module(f"effitrain.cli.{verb}").command
    given = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert given == set(FLAGS[verb].split())
    assert all(option.help for option in command.params)


def test_help_of_every_verb_without_torch():
    code = f"""
import sys
from effitrain.cli.main import main
for arguments in ([], *([verb] for verb in {VERBS!r})):
    try:
        main([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0, arguments
heavy = {{"torch", "numpy", "transformers", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(VERBS) + 1 and not done.stderr
    assert "..." not in done.stdout.partition("Commands:")[2].partition("Usage: ")[0]  # what a verb does, to the end


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_answers_in_half_a_second(arguments):
    """CPU seconds, which on a machine of one's own are all: waiting for a core that others use does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([Path(sys.executable).with_name("effitrain"), *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def planned(effitrain, *arguments: object) -> dict:
    answer = effitrain("plan", *arguments, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_snake_case_is_accepted(effitrain, asked):
    kebab = planned(effitrain, "--model", asked["--model"], "--max-seq-len", 40, "--lora-targets", "q_proj")
    snake = planned(effitrain, "--model", asked["--model"], "--max_seq_len", 40, "--lora_targets", "q_proj")
    assert kebab["ledger"] == snake["ledger"] and snake["settings"]["max_seq_len"] == 40


def test_flags_override_the_recipe_file(effitrain, asked, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {asked['--model']}\nmax-seq-len: 40\nbatch_size: 2\nlr: 0.5\n")
    settings = planned(effitrain, "--config", path)["settings"]
    assert (settings["max_seq_len"], settings["batch_size"], settings["lr"]) == (40, 2, 0.5)
    settings = planned(effitrain, "--config", path, "--batch-size", 3, "--lr", "auto")["settings"]
    assert (settings["max_seq_len"], settings["batch_size"], settings["lr"]) == (40, 3, 2e-4)


def test_a_switch_turns_off_what_the_recipe_file_turns_on(effitrain, asked, finished, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((finished / "recipe.yaml").read_text().replace("packing: false", "packing: true"))
    off = effitrain("run", "--config", path, "--no-packing", "-o", finished)
    assert off.code == 0 and "finished" in off.out
    assert effitrain("run", "--config", path, "-o", finished).code == 2


def test_the_recipe_of_a_run_holds_every_field(finished):
    import yaml

    fields = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert fields.keys() == Recipe.model_fields.keys()
    decided = ("max_seq_len", "batch_size", "grad_accum", "lr", "dtype", "recompute", "optimizer")
    assert not [name for name in decided if fields[name] in (None, "auto")]
