"""Systems and ways of starting that are refused: by every verb and by the functions, in the same words."""

import platform

import pytest

import effitrain as package
from effitrain.core import system
from effitrain.core.errors import InputError
from effitrain.core.recipe import make_recipe
from effitrain.evals import doctor

ELSEWHERE = {
    ("Windows", "11"): ("inside WSL2. This is Windows itself.", "wsl --install"),
    ("Darwin", "23.1"): ("inside WSL2. This is macOS.", "container"),
    ("FreeBSD", "14"): ("This is FreeBSD.", "container"),
    ("Linux", "4.4.0-19041-Microsoft"): ("looks like WSL1", "wsl --set-version"),
}


@pytest.fixture
def fake(monkeypatch):
    """``fake(system, release)``: what Python says of this machine."""

    def set_to(name, release):
        monkeypatch.setattr(platform, "system", lambda: name)
        monkeypatch.setattr(platform, "release", lambda: release)

    return set_to


@pytest.mark.parametrize("release", ["6.1.0-amd64", "5.15.153.1-microsoft-standard-WSL2"])
def test_linux_and_wsl2(fake, release):
    fake("Linux", release)
    assert system.unsupported() is None


@pytest.mark.parametrize("here", ELSEWHERE)
@pytest.mark.parametrize("verb", [["--help"], ["plan"], ["run"], ["doctor"]])
def test_elsewhere_every_verb_says_so(effitrain, fake, here, verb):
    fake(*here)
    answer = effitrain(*verb)
    assert answer.code == 2 and not answer.out
    assert all(words in answer.err for words in ELSEWHERE[here])


@pytest.mark.parametrize("here", ELSEWHERE)
@pytest.mark.parametrize("name", package.__all__)
def test_elsewhere_every_function_says_so(fake, here, name):
    fake(*here)
    if name == "__version__":
        assert package.__version__
        return
    with pytest.raises(InputError, match="Linux") as error:
        getattr(package, name)
    assert error.value.next_step


def test_several_processes_are_one_too_many(effitrain, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = effitrain("run", "-o", tmp_path / "out")
    assert answer.code == 2 and not [*tmp_path.iterdir()]
    assert "WORLD_SIZE is 2: so many processes" in answer.err and "uses one card" in answer.err
    assert "torchrun" in answer.err and "unset WORLD_SIZE" in answer.err
    assert effitrain("prune", "--model", "tiny", "-o", tmp_path / "small").code == 2 and not [*tmp_path.iterdir()]
    ok, told = dict(doctor.of_the_machine())["system"]()
    assert ok is False and "WORLD_SIZE is 2" in told
    for verb in (["--help"], ["plan"], ["run", "--dry-run"], ["doctor", "--help"]):
        assert effitrain(*verb).code == 0, verb
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert system.one_of_several() is None


@pytest.mark.parametrize("flag", ["--gpus", "--num-gpus", "--nproc-per-node", "--deepspeed", "--tensor_parallel_size"])
def test_flags_and_keys_that_ask_for_several_cards(effitrain, flag):
    answer = effitrain("run", flag, 2)
    assert answer.code == 2 and "uses one card" in answer.err and "Did you mean" not in answer.err
    with pytest.raises(InputError, match="uses one card"):
        make_recipe({flag.strip("-").replace("-", "_"): 2})
