"""A variant of a user's own: one file and no edit. It plans, trains, streams, is killed and goes on, is pruned and
recovered, evaluated and exported; one that cannot be saved is refused before anything is loaded.
"""

import json
import os
import py_compile
import re
import shlex
import sys

import pytest
import torch
from killed import Killed, KilledAfter
from safetensors.torch import load_file

from effitrain import api
from effitrain.adapters.variants import OWN, adapter_class, code_of, kinds, own_file, own_kinds
from effitrain.core.errors import InputError
from effitrain.planning import plan, recipe

from .conftest import PAGE


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory) -> dict:
    """A run of three steps in which the gates move."""
    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"Say {i}", "completion": f"{i} " * (i + 1)}) for i in range(12)))
    return {
        "model": str(tiny_model()), "dataset": str(rows), "quant": "none", "method": "gated", "lora_r": 4,
        "lora_dropout": 0.1, "max_seq_len": 48, "batch_size": 2, "grad_accum": 2, "max_steps": 4, "lr": 3e-2,
        "save_every": 1, "gpu_mem": 2**34, "host_mem": 2**34,
    }  # fmt: skip


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """``run(name, events, **fields)``: the losses of its steps, and its adapter's tensors."""
    monkeypatch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")

    def call(name, events=None, **fields):
        asked = recipe(**{**base, **fields, "output_dir": str(tmp_path / name)})
        report = api.run(asked, events)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return report, [json.loads(line)["loss"] for line in lines], load_file(tmp_path / name / ADAPTER)

    return call


ADAPTER = "adapter/adapter_model.safetensors"


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_trains_and_is_no_lora(run, own_folder):
    report, losses, adapter = run("gated")
    assert losses[-1] < losses[0] and report.method == "gated" and report.loss.eval_after < report.loss.eval_before
    assert not same(adapter, run("lora", method="lora")[2])  # the gates have their share


def test_killed_it_goes_on_to_the_same_bytes(run, own_folder):
    whole = run("whole")
    with pytest.raises(Killed):
        run("killed", KilledAfter(2))
    again = run("killed")
    assert again[1] == whole[1] and same(again[2], whole[2])


def test_streamed_and_in_four_bits_it_learns_the_same(run, own_folder):
    one = run("resident", quant="nf4")
    two = run("streamed", quant="nf4", fit="stream", resident_layers=0)
    assert one[1] == two[1] and same(one[2], two[2])


def test_trained_on_a_pruned_model_it_is_recovered(run, own_folder, tmp_path):
    report, _, adapter = run(
        "pruned", fit="prune", prune_ratio=0.5, prune_exempt="0,0", prune_score="magnitude", align="none"
    )
    small = load_file(tmp_path / "pruned" / "adapter-small" / "adapter_model.safetensors")
    assert report.fit == "prune" and small.keys() == adapter.keys()
    assert any(small[name].shape != adapter[name].shape for name in small)


@pytest.mark.parametrize("fit", ["resident", pytest.param("stream", marks=pytest.mark.slow)])
def test_its_plan_is_proved_by_the_real_step(base, own_folder, fit):
    beside = {"resident_layers": 0} if fit == "stream" else {}
    asked = recipe(**{**base, "model": "llama-3.2-1b", "fit": fit, "max_seq_len": 512, "lora_dropout": 0.0, **beside})
    made = plan(asked)
    assert made.fits and made.fit == fit
    assert abs(api.prove(asked).proof["error"]) < 0.03


def test_saved_it_is_a_plain_lora_that_needs_no_file(run, base, own_folder, tmp_path, monkeypatch):
    report, _, adapter = run("gated")
    monkeypatch.delenv(OWN)
    fields = {key: base[key] for key in ("model", "dataset", "quant", "max_seq_len", "batch_size", "gpu_mem")}
    scores = api.evaluate(recipe(**fields), str(tmp_path / "gated"))
    assert scores["loss"] < report.loss.eval_before
    api.export(recipe(**fields), str(tmp_path / "gated"), str(tmp_path / "exported"))
    api.export(recipe(**fields), str(tmp_path / "gated"), str(tmp_path / "merged"), "merged")
    exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    for name in (name for name in adapter if "lora_A" in name):
        twin = name.replace("lora_A", "lora_B")
        scale = config["lora_alpha"] / config["r"]
        torch.testing.assert_close(scale * exported[twin] @ exported[name], 8.0 * adapter[twin] @ adapter[name])
    merged, plain = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "merged", base["model"]))
    path = "model.layers.1.mlp.up_proj"
    prefix = f"base_model.model.{path}"
    update = 8.0 * adapter[f"{prefix}.lora_B.weight"] @ adapter[f"{prefix}.lora_A.weight"]
    torch.testing.assert_close(merged[f"{path}.weight"], (plain[f"{path}.weight"] + update).to(torch.bfloat16))


def test_a_run_goes_on_only_with_the_file_it_began_with(run, own_folder):
    with pytest.raises(Killed):
        run("out", KilledAfter(2))
    (own_folder / "gated.py").write_text((own_folder / "gated.py").read_text() + "\n# changed\n")
    with pytest.raises(InputError, match="method changed since it began"):
        run("out")


def test_only_the_variable_leads_to_a_file(own_folder, example, monkeypatch, tmp_path):
    assert "gated" not in kinds() and own_file("gated") == own_folder / "gated.py" and code_of("gated")
    monkeypatch.delenv(OWN)
    monkeypatch.chdir(own_folder)
    (tmp_path / "recipe.yaml").write_text("method: adapters/gated.py\n")
    for method in ("gated", "gated.py", "./gated", str(own_folder / "gated.py"), "..adapters.gated"):
        with pytest.raises(InputError, match="no such method") as refused:
            plan(recipe(model="tiny", method=method))
        assert OWN in refused.value.next_step


def test_only_the_file_asked_for_is_imported(own_folder):
    (own_folder / "other.py").write_text("raise SystemExit('imported')")
    assert adapter_class("gated").__name__ == "Gated"
    with pytest.raises(InputError, match=r"There are: lora, .*, gated, other"):
        adapter_class("gatde")


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("my-gated", "my-gated.py is none, for its name must be a Python identifier: rename it my_gated.py."),
        ("my_gated", "my-gated.py is none, for its name must be a Python identifier: rename it my_gated.py."),
        ("2fast", "2fast.py is none, for its name must be a Python identifier: rename it _2fast.py."),
        ("loar", f"{OWN}=FOLDER adds variants"),
        ("gated", f"{OWN}=FOLDER adds variants"),
    ],
)
def test_what_is_no_variant_is_not_listed_and_a_wrong_name_is_told(own_folder, method, told):
    (own_folder / "__init__.py").write_text("")
    (own_folder / "gated.py").rename(own_folder / "my-gated.py")
    (own_folder / "2fast.py").write_text("")
    (own_folder / "gated.py").mkdir()
    (own_folder / "gone.py").symlink_to(own_folder / "nowhere.py")
    assert not own_kinds()
    with pytest.raises(InputError, match="no such method") as refused:
        adapter_class(method)
    assert told in refused.value.next_step and "__init__" not in refused.value.next_step


def test_one_that_cannot_be_read_says_so(own_folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    for use in (adapter_class, code_of):
        with pytest.raises(InputError, match=r"gated\.py cannot be read: Permission denied"):
            use("gated")


def test_it_is_the_file_as_it_is_that_runs_and_no_bytecode_of_an_earlier_one(own_folder, example):
    path = own_folder / "gated.py"
    path.write_text(f"{example}\nFAST = 1\n")
    py_compile.compile(str(path))  # which Python takes for the file's while size and second of change are the same
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(f"{example}\nFAST = 2\n")
    os.utime(path, ns=times)
    assert sys.modules[adapter_class("gated").__module__].FAST == 2


def test_its_file_is_run_once(own_folder, example, tmp_path):
    runs = tmp_path / "runs"
    (own_folder / "gated.py").write_text(f"{example}\nimport os\n\nos.mkdir({str(runs)!r})\n")
    assert adapter_class("gated") is adapter_class("gated") and runs.is_dir()


BROKEN = {
    "cannot be imported, line 3: SystemExit: now": lambda source: "import sys\n\nsys.exit('now')\n",
    "sets no ADAPTER": lambda source: source.replace("ADAPTER = Gated", ""),
    "subclass of Adapter": lambda source: source.replace("ADAPTER = Gated", "ADAPTER = LoRA.low_rank"),
    "cannot be imported, line 6: ModuleNotFoundError": lambda source: source.replace("from torch", "from trorch"),
    "cannot be imported: .*line 27.*SyntaxError": lambda source: source.replace(
        "def factors(self):", "def factors(self)"
    ),
    "Gated in .* has no build and no factors": lambda source: (
        source.replace("import LoRA", "import LoRA\nfrom effitrain.adapters.base import Adapter")
        .replace("class Gated(LoRA)", "class Gated(Adapter)")
        .replace("def factors", "def parts")
    ),
}


@pytest.mark.parametrize("told", BROKEN)
def test_one_that_could_not_be_saved_is_refused_before_anything_is_loaded(run, own_folder, example, told, tmp_path):
    (own_folder / "gated.py").write_text(BROKEN[told](example))
    heard = []

    class Listens(api.Events):
        def planned(self, plan):
            heard.append(plan)

    with pytest.raises(InputError, match=f"(?s){told}") as refused:
        run("out", Listens())
    assert "docs/own_adapter.md" in refused.value.next_step
    assert not heard and not (tmp_path / "out" / "plan.json").exists()


def test_a_name_that_is_taken_and_a_folder_that_is_none(own_folder, monkeypatch):
    (own_folder / "lora.py").write_text("")
    with pytest.raises(InputError, match="effitrain's own method lora"):
        adapter_class("lora")
    monkeypatch.setenv(OWN, str(own_folder / "nowhere"))
    with pytest.raises(InputError, match="which is no folder"):
        adapter_class("gated")


def test_the_commands_of_the_page_run(effitrain, own_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("effitrain.report.files.loss_png", lambda *drawn: b"")
    (tmp_path / "my.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": "Nora."}))
    block = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0].splitlines()
    for line in block:
        first, *words = shlex.split(line)
        if first == "export":
            monkeypatch.setenv(*words[0].split("="))
        else:
            answer = effitrain(*words)
            assert first == "effitrain" and answer.code == 0, answer.err
