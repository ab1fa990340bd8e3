"""From the name of a model to its config and weights: a preset, a folder, or a hub id. Imports no torch.

The network is asked only for a hub id or preset that the user named, and only for what the hub's cache does not hold.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effitrain.core.errors import InputError
from effitrain.core.presets import Preset, find_preset, preset_names
from effitrain.io.model_folder import read_config, stored_tensors
from effitrain.io.stores import default_store_dir, is_stored, pinned_commit

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
          "vocab.*", "merges.txt", "chat_template*"]  # fmt: skip
_ALL = [*_SMALL, "model*.safetensors", "model.safetensors.index.json"]
_TIMEOUT = 10  # seconds until a silent hub counts as out of reach


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: as the user wrote it.
        folder: of its files, when they are local.
        config: content of its config.json.
        preset: when it was named by one.
        revision: branch, tag or commit on the hub: that of ``owner/name@revision``, else the one that a store was built
            from; None for what the hub has now.
    """

    name: str
    folder: Path | None
    config: Mapping[str, Any]
    preset: Preset | None
    revision: str | None = None

    @property
    def hub_id(self) -> str:
        """Where the hub has a model that is not in a folder."""
        if self.preset and self.preset.hub_id:
            return self.preset.hub_id
        return self.name.partition("@")[0] if self.revision else self.name

    @property
    def loads_from(self) -> str:
        """What stock transformers finds it by: its folder, of a built-in model too, or its hub id."""
        built_in = self.preset.folder if self.preset else None
        return str(built_in or Path(self.hub_id).expanduser())


def find_model(name: str) -> ModelSource:
    """The model of this name, with its config and without its weights: a preset, then a folder, then a hub id.

    Raises:
        InputError: there is no such preset, folder or hub id, or its config cannot be had.
    """
    preset = find_preset(name)
    if preset:
        return _pinned(ModelSource(name, preset.folder, preset.config, preset))
    path = Path(name).expanduser()
    if path.exists() and name:
        return ModelSource(name, path, read_config(path), None)
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise InputError(f"There is no folder {path}.", next_step="Check --model.")
    parts = _HUB_ID.fullmatch(name)
    if not parts:
        raise _unknown(name)
    source = _pinned(ModelSource(name, None, {}, None, parts[2]))
    return replace(source, config=read_config(_from_hub(source, _SMALL, _for_config(name))))


def _pinned(source: ModelSource) -> ModelSource:
    """``source`` at the commit that its store was built from, unless a revision is named."""
    if source.folder or source.revision:
        return source
    return replace(source, revision=pinned_commit(default_store_dir(), source.hub_id))


def check_weights(source: ModelSource) -> None:
    """Make sure, in seconds, that ``fetch_weights`` can succeed: headers of local files, or access on the hub.

    Raises:
        InputError: damaged or missing files, no network, no access, or no such model.
    """
    if source.folder:
        read_config(source.folder)
        stored_tensors(source.folder)
    elif not _cached(source) and not is_stored(default_store_dir(), source.hub_id, source.revision):
        _ask_hub(source, _for_weights(source))


def fetch_weights(source: ModelSource) -> Path:
    """The folder with config, tokenizer and safetensors of ``source``; downloads what the cache does not hold.

    Raises:
        InputError: the weights cannot be had; says how to get them, how to name a folder, and how to rehearse.
    """
    if source.folder:
        check_weights(source)
        return source.folder
    folder = _cached(source) or _from_hub(source, _ALL, _for_weights(source))
    stored_tensors(folder)
    return folder


def is_local(source: ModelSource) -> bool:
    """Whether all files of ``source`` are on this machine, in a folder or in the hub's cache."""
    return source.folder is not None or _cached(source) is not None


def fetch_small(source: ModelSource) -> Path:
    """The folder with config and tokenizer of ``source``, without its weights.

    Raises:
        InputError: they cannot be had.
    """
    return source.folder or _from_hub(source, _SMALL, _for_weights(source))


def revision_of(source: ModelSource) -> str:
    """The commit of ``source``; the hub is asked when it is not known.

    Raises:
        InputError: the hub cannot be asked.
    """
    if source.revision and _COMMIT.fullmatch(source.revision):
        return source.revision
    return _ask_hub(source, _for_weights(source))


def fetch_file(source: ModelSource, name: str, revision: str, folder: Path) -> Path | None:
    """Download one file of ``source`` to ``folder``; None when the hub has none of this name.

    Raises:
        InputError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source.hub_id, name, revision=revision, local_dir=folder))
    except LocalEntryNotFoundError as error:  # the hub was not reached; it is an EntryNotFoundError too
        raise _explain(source.hub_id, error, _for_weights(source)) from error
    except EntryNotFoundError:
        return None
    except Exception as error:
        raise _explain(source.hub_id, error, _for_weights(source)) from error


def _cached(source: ModelSource) -> Path | None:
    """The model's folder in the hub cache, when all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(source.hub_id, allow_patterns=_ALL, revision=source.revision, local_files_only=True)
        folder = Path(found)
        read_config(folder)
        stored_tensors(folder)
    except (LocalEntryNotFoundError, InputError):
        return None
    return folder


def _from_hub(source: ModelSource, patterns: list[str], next_step: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            source.hub_id, allow_patterns=patterns, revision=source.revision, etag_timeout=_TIMEOUT
        )
    except Exception as error:
        raise _explain(source.hub_id, error, next_step) from error
    return Path(found)


def _ask_hub(source: ModelSource, next_step: str) -> str:
    """The commit that the hub has of ``source`` now."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(source.hub_id, "config.json", revision=source.revision)
        return str(get_hf_file_metadata(url, timeout=_TIMEOUT).commit_hash)
    except Exception as error:
        raise _explain(source.hub_id, error, next_step) from error


def _explain(hub_id: str, error: Exception, next_step: str) -> InputError:
    """What went wrong between us and the hub, in the user's terms; anything not foreseen is quoted."""
    from huggingface_hub import errors

    reason = error
    while reason.__cause__ and isinstance(reason, errors.LocalEntryNotFoundError):
        reason = reason.__cause__  # type: ignore[assignment]
    if isinstance(reason, errors.GatedRepoError):
        fact, cause = f"{hub_id} is gated.", "Its owner asks for an accepted licence and a login."
    elif isinstance(reason, errors.RepositoryNotFoundError):
        fact, cause = f"The hub has no {hub_id}, and there is no folder of that name.", "Or it is private."
    elif isinstance(reason, errors.OfflineModeIsEnabled):
        fact, cause = f"{hub_id} is not in the hub cache.", "HF_HUB_OFFLINE forbids to download it."
    elif isinstance(reason, errors.RevisionNotFoundError):
        fact, cause = f"The hub has no such revision of {hub_id}.", ""
    elif isinstance(reason, errors.HfHubHTTPError):
        fact, cause = f"{hub_id} cannot be had from the hub: {_first_line(reason)}.", ""
    elif isinstance(reason, errors.HFValidationError):
        fact, cause = f"There is no folder {hub_id}, and it is no hub id: {_first_line(reason)}.", ""
    elif isinstance(reason, OSError) and reason.errno:
        fact, cause = f"{hub_id} cannot be written to the hub cache: {reason.strerror}.", ""
    else:
        fact = f"{hub_id} is not in the hub cache, and the hub cannot be reached ({_first_line(reason)})."
        cause = "This machine has no network, or a proxy is not set."
    return InputError(fact, cause, next_step)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _for_weights(source: ModelSource) -> str:
    return (
        f"To get the weights: accept the licence on the page of {source.hub_id} if it asks for one, `hf auth login`,"
        " and run this again with network.\n"
        f"To use weights you have: --model FOLDER, with config.json and safetensors.\n"
        f"To rehearse a run without them: `effitrain run --model {source.name} --weights synthetic`"
    )


def _for_config(name: str) -> str:
    return (
        f"If {name} is a folder, check its path. If the hub asks for a licence: accept it on the model's page, and"
        " `hf auth login`.\n"
        "Without network: --model FOLDER, or rehearse on a preset's shape: `effitrain run --model llama-3.1-8b"
        " --weights synthetic`"
    )


def _unknown(name: str) -> InputError:
    nearest = difflib.get_close_matches(name.lower(), preset_names(), n=1, cutoff=0.5)
    return InputError(
        f"There is no preset and no folder {name!r}." + (f" Did you mean {nearest[0]!r}?" if nearest else ""),
        next_step=f"Presets: {', '.join(preset_names())}. A hub id looks like owner/name.",
    )
