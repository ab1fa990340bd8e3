"""Rows of a data set of the hub, through ``datasets``; nothing here runs code that comes with the data."""

from typing import Any

from effitrain.core.errors import InputError

_TIMEOUT = 10  # seconds until a silent hub counts as out of reach
_NEXT = "Check the name, write owner/name:configuration where there are several, or download a file and give its path."


def hub_rows(name: str) -> list[dict[str, Any]]:
    """The training split (or the only one) of ``owner/name`` or ``owner/name:configuration``.

    Raises:
        InputError: the hub has no such set, cannot be reached, or the set cannot be loaded.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    _ask_hub(repository)
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"The data set {name} cannot be loaded: {_first_line(error)}.", next_step=_NEXT) from error
    if "train" not in splits and len(splits) > 1:
        raise InputError(f"The data set {name} has no split train, but {', '.join(splits)}.", next_step=_NEXT)
    return list(splits["train"] if "train" in splits else next(iter(splits.values())))


def _ask_hub(repository: str) -> None:
    """Fail in seconds where ``datasets`` would try again and again; under HF_HUB_OFFLINE its cache may hold the set."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(repository, timeout=_TIMEOUT)
    except errors.OfflineModeIsEnabled:
        return
    except errors.RepositoryNotFoundError:
        fact, cause = f"There is no file or folder {repository}, and no such data set on the hub.", "Or it is private."
        raise InputError(fact, cause, _NEXT) from None
    except Exception as error:
        raise InputError(
            f"There is no file or folder {repository}, and the hub cannot be asked: {_first_line(error)}.",
            "The name is misspelt, or this machine has no network.",
            "Check the path. HF_HUB_OFFLINE=1 takes data sets that were downloaded before.",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
