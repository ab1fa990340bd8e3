import datasets
import huggingface_hub
import pytest
from huggingface_hub import errors

from effitrain.core.errors import InputError
from effitrain.data.hub import hub_rows

ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.fixture
def hub(monkeypatch):
    """``hub(splits, answer)``: what load_dataset gives, and the exception that the hub's API raises, if any."""
    asked = []

    def set_up(splits, answer=None):
        def load_dataset(path, name=None):
            asked.append((path, name))
            if isinstance(splits, Exception):
                raise splits
            return splits

        def dataset_info(self, repository, timeout):
            if answer:
                raise answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        return asked

    return set_up


def test_the_training_split_is_taken(hub):
    hub({"test": [], "train": ROWS})
    assert hub_rows("owner/name") == ROWS


def test_an_only_split_is_taken_whatever_its_name(hub):
    asked = hub({"test": ROWS})
    assert hub_rows("owner/name:main") == ROWS
    assert asked == [("owner/name", "main")]


def test_offline_the_cache_of_datasets_is_asked(hub):
    hub({"train": ROWS}, errors.OfflineModeIsEnabled("offline"))
    assert hub_rows("owner/name") == ROWS


def test_several_splits_without_train(hub):
    hub({"test": ROWS, "validation": ROWS})
    with pytest.raises(InputError, match="has no split train, but test, validation"):
        hub_rows("owner/name")


@pytest.mark.parametrize("error", [ValueError("Config name is missing."), ConnectionError("Couldn't reach it")])
def test_a_set_that_cannot_be_loaded(hub, error):
    hub(error)
    with pytest.raises(InputError, match=str(error)[:20]):
        hub_rows("owner/name")


def test_a_hub_out_of_reach_says_so(hub):
    hub({"train": ROWS}, OSError("Name or service not known"))
    with pytest.raises(InputError, match="the hub cannot be asked: Name or service not known") as error:
        hub_rows("owner/name")
    assert "HF_HUB_OFFLINE=1" in str(error.value)


def test_a_set_that_is_neither_here_nor_in_the_cache_offline():
    with pytest.raises(InputError, match="owner/name cannot be loaded"):
        hub_rows("owner/name")
