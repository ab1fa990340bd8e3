"""The command line's flags: the frozen list, their spellings, recipes in YAML, and that no field is without effect."""

import hashlib
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from effitrain.cli.main import VERBS
from effitrain.core.errors import InputError
from effitrain.core.recipe import Recipe
from effitrain.planning import plan, recipe

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


# What shows that a field does something: see the views below.
PLAN = {
    "gpu_mem": 2**30, "host_mem": 2**30, "gpu": "t4", "quant": "nf4", "dtype": "fp32", "recompute": "layer",
    "max_seq_len": 40, "batch_size": 2, "grad_accum": 3, "optimizer": "adamw8bit", "lora_r": 2,
    "lora_targets": ("q_proj",), "model": "llama-3.2-1b", "fit": "stream", "offload_activations": "on",
    "prefer": "fast", "resident_layers": 0, "stream_order": "micro-batch", "mlp_tiles": 4, "attention": "s2",
    "s2_group": 20, "rope_scaling": "none", "rope_factor": 8.0, "train_norms": True, "train_embeddings": True,
}  # fmt: skip
# Fields that matter only beside others.
BESIDE = {
    "prefer": {"model": "llama-70b", "gpu_mem": 20 * 2**30, "host_mem": 2**36, "quant": "nf4", "gpu": "rtx4090"},
    "s2_group": {"attention": "s2"}, "rope_scaling": {"max_seq_len": 600}, "rope_factor": {"max_seq_len": 600},
    "resident_layers": {"fit": "stream"}, "stream_order": {"fit": "stream", "batch_size": 1, "grad_accum": 2},
    "join_documents": {"format": "text"},
}  # fmt: skip
TOKENS = {
    "dataset": "other", "format": "text", "columns": {"completion": "text"}, "template": "chatml",
    "train_on_prompt": True, "truncation": "left", "eval_dataset": "other", "eval_fraction": 0.5,
    "join_documents": True,
}  # fmt: skip
TRAINING = {
    "weights": "synthetic:7", "packing": True, "lr": 1e-3, "schedule": "constant", "warmup": 0.9, "epochs": 2.0,
    "max_steps": 1, "seed": 1, "weight_decay": 0.5, "max_grad_norm": 1e-3, "lora_alpha": 4.0, "lora_dropout": 0.5,
    "lora_rslora": True, "init_adapter": "finished", "attention": "s2", "s2_group": 20, "rope_scaling": "ntk",
    "rope_factor": 8.0, "train_norms": True, "train_embeddings": True,
}  # fmt: skip
FILES = {"output_dir": "elsewhere", "save_every": 4, "keep_checkpoints": 1, "eval_every": 1, "report_to": "wandb"}
PRUNING = {
    "prune_ratio": 0.25, "prune_parts": "ffn", "prune_score": "magnitude", "prune_round": 32, "prune_exempt": (1, 0),
    "align": "bias", "calib_dataset": "other", "prune_ranking": "global",
}  # fmt: skip
LISA = {
    "lisa_layers": 2, "lisa_interval": 2, "lisa_sampling": "shuffle", "lisa_state": "keep-host",
    "lisa_train_embeddings": True,
}  # fmt: skip
REFUSED = {
    "prune_method": "loraprune",
    "small_model": "nowhere",
    "method": "loro",
    "resume": "nowhere",
}


def test_every_field_has_its_place():
    places = [*PLAN, *TOKENS, *TRAINING, *FILES, *PRUNING, *LISA, *REFUSED]
    assert sorted({*places}) == sorted(Recipe.model_fields)


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> dict:
    """The fields that one at a time is changed of."""
    folder = tmp_path_factory.mktemp("fields")
    for name, count in (("rows", 12), ("other", 9)):
        rows = (
            {"prompt": f"Say {name} " * (2 + i // 2), "completion": f"{i} " * (i + 1), "text": f"text {i}"}
            for i in range(count)
        )
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "model": str(tiny_model()), "dataset": str(folder / "rows.jsonl"), "quant": "none", "lora_r": 4,
        "max_seq_len": 96, "batch_size": 3, "grad_accum": 1, "lr": 1e-2, "eval_fraction": 0.2, "save_every": 1,
        "gpu_mem": 2**35, "host_mem": 2**35,
    }  # fmt: skip


@pytest.fixture
def changed(base, finished):
    """``changed(field, value)``: a recipe of ``base`` with one field changed; stand-ins become paths."""

    def make(field: str, value: object, **beside: object) -> Recipe:
        paths = {"other": str(Path(base["dataset"]).with_name("other.jsonl")), "finished": str(finished)}
        return recipe(**{**base, **beside, field: paths.get(value, value) if isinstance(value, str) else value})

    return make


@pytest.mark.parametrize("field", PLAN)
def test_fields_that_change_the_plan(base, changed, field):
    beside = BESIDE.get(field, {})
    before, after = plan(recipe(**{**base, **beside})), plan(changed(field, PLAN[field], **beside))
    assert (before.settings, before.ledger, before.budget_bytes, before.reasons) != (
        *(after.settings, after.ledger, after.budget_bytes, after.reasons),
    )


@pytest.mark.parametrize("field", TOKENS)
def test_fields_that_change_the_tokens(base, changed, tmp_path, field):
    from effitrain.data.prepare import prepare_data
    from effitrain.model.load import find_base

    def view(asked: Recipe) -> list[bytes]:
        tokens = prepare_data(asked, find_base(asked.model).tokenizer(), 96, tmp_path)
        return [array.tobytes() for part in (tokens.train, tokens.eval) for array in vars(part).values()]

    beside = BESIDE.get(field, {})
    assert view(recipe(**{**base, **beside})) != view(changed(field, TOKENS[field], **beside))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """``ran(recipe)``: metrics of a run, its adapter, and its folder, but for the picture, which takes long to draw."""
    from effitrain import api

    def run(asked: Recipe) -> tuple[list, str, Path]:
        folder = tmp_path_factory.mktemp("ran") / asked.output_dir
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")
            api.run(asked.changed(output_dir=str(folder)))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        adapter = b"".join(path.read_bytes() for path in sorted((folder / "adapter").iterdir()))
        return [(line["loss"], line["lr"]) for line in lines], hashlib.sha256(adapter).hexdigest(), folder

    return run


@pytest.fixture(scope="module")
def unchanged(base, ran):
    return ran(recipe(**base))


def test_the_same_recipe_gives_the_same_run(base, ran, unchanged):
    assert ran(recipe(**base))[:2] == unchanged[:2]


@pytest.mark.parametrize("field", TRAINING)
def test_fields_that_change_the_training(changed, ran, unchanged, field):
    beside = {"s2_group": {"attention": "s2"}, "rope_scaling": {"rope_factor": 2.0}}.get(field, {})
    metrics, adapter, _ = ran(changed(field, TRAINING[field], **beside))
    assert (metrics, adapter) != unchanged[:2] and adapter != unchanged[1]


@pytest.mark.parametrize("field", FILES)
def test_fields_that_change_where_and_what_is_written(changed, ran, unchanged, monkeypatch, field):
    sent: list[dict] = []
    tracker = SimpleNamespace(init=lambda **where: SimpleNamespace(log=lambda values, step: sent.append(values)))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    metrics, adapter, folder = ran(changed(field, FILES[field]))
    assert (metrics, adapter) == unchanged[:2]
    views = [
        (
            where.name,
            sorted(path.name for path in (where / "checkpoints").iterdir()),
            len(json.loads((where / "run.json").read_text())["evals"]),
        )
        for where in (folder, unchanged[2])
    ]
    assert views[0] != views[1] or len(sent) == len(metrics)


@pytest.mark.parametrize("field", PRUNING)
def test_fields_that_change_the_small_model(base, changed, tmp_path, field):
    from effitrain import api

    pruned = {"fit": "prune", "prune_ratio": 0.5, "prune_exempt": (0, 0), "prune_round": 1}

    def view(asked: Recipe, name: str) -> tuple[str, dict]:
        folder = api.prune(asked.changed(output_dir=str(tmp_path / name)))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        return digest, json.loads((folder / "config.json").read_text())

    asked = changed("dataset", base["dataset"]).changed(**pruned)
    value = str(Path(base["dataset"]).with_name("other.jsonl")) if field == "calib_dataset" else PRUNING[field]
    assert view(asked, "before") != view(asked.changed(**{field: value}), "after")


@pytest.mark.parametrize("field", LISA)
def test_fields_that_change_which_layers_are_trained(changed, tmp_path, field):
    """Of a run by turns; ``tests/train/test_lisa.py`` says how."""
    from effitrain import api

    beside = {
        "method": "lisa", "lisa_layers": 1, "lisa_interval": 1, "max_steps": 6, "lisa_train_embeddings": False,
    }  # fmt: skip
    beside |= {"lora_r": 16}

    def view(asked: Recipe, name: str) -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")
            api.run(asked.changed(output_dir=str(tmp_path / name)))
        return (tmp_path / name / "model" / "model.safetensors").read_bytes()

    before = changed("seed", 42, **beside)
    assert view(before, "before") != view(before.changed(**{field: LISA[field]}), "after")


@pytest.mark.parametrize("field", REFUSED)
def test_fields_that_are_refused(changed, ran, field):
    with pytest.raises(InputError, match=str(REFUSED[field])):
        asked = {"fit": "prune", "prune_ratio": 0.5, "prune_exempt": (0, 0)} if field == "small_model" else {}
        ran(changed("seed", 42).changed(**asked, **{field: REFUSED[field]}))
