"""The adapter variants there are, a file each: those of this folder, and the user's own.

A user's files lie in the folder that the environment names as ``EFFITRAIN_ADAPTERS``. Nothing else leads to a file: no
recipe, model or data set can make effitrain run code that came with it. Only the file of the variant that is asked for
is imported.
"""

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType

from effitrain.adapters.base import Adapter
from effitrain.core.errors import InputError
from effitrain.core.methods import METHODS

OWN = "EFFITRAIN_ADAPTERS"
_NEEDED = ("build", "forward", "factors", "load_factors")
_HOW = "docs/own_adapter.md has an example that works."


def kinds() -> list[str]:
    """The variants in this folder."""
    import effitrain.adapters as room

    names = [module.name for module in pkgutil.iter_modules(room.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"effitrain.adapters.{name}"), "ADAPTER")]


def own_kinds() -> list[str]:
    """The user's variants."""
    return list(_own_files())


def own_file(kind: str) -> Path | None:
    """The user's file of a variant; None for those in this folder, and where there is none.

    Raises:
        InputError: the folder that the environment names is none, or its file has the name of another method.
    """
    path = _own_files().get(kind)
    if path and kind in (*kinds(), *METHODS):
        raise InputError(f"{path} has the name of effitrain's own method {kind}.", next_step="Give the file another.")
    return path


def adapter_class(kind: str) -> type[Adapter]:
    """The class of a variant.

    Raises:
        InputError: no such variant, which names those there are; or it lacks a part of the contract.
    """
    if path := own_file(kind):
        return _checked(_imported(path, _source(path)), path)
    if kind not in kinds():
        there_are = ", ".join([*kinds(), *METHODS, *own_kinds()])
        adds = f"{OWN}=FOLDER adds variants of your own: docs/own_adapter.md."
        if path := _misnamed(kind):
            adds = f"{path} is none, for its name must be a Python identifier: rename it {_identifier(kind)}.py."
        raise InputError(f"--method {kind}: no such method.", next_step=f"There are: {there_are}. {adds}")
    cls: type[Adapter] = importlib.import_module(f"effitrain.adapters.{kind}").ADAPTER
    return cls


def check_method(method: str) -> None:
    """Refuse a method that there is not, or that could not be saved."""
    if method not in METHODS:
        adapter_class(method)


def code_of(method: str) -> dict[str, str]:
    """What a run with a user's own variant is made from besides data and model; nothing for other methods."""
    path = None if method in METHODS else own_file(method)
    return {"method": hashlib.sha256(_source(path)).hexdigest()} if path else {}


def _own_files() -> dict[str, Path]:
    """The user's files by the name of their variant."""
    return {path.stem: path for path in _in_own_folder() if path.stem.isidentifier() and path.stem != "__init__"}


def _misnamed(kind: str) -> Path | None:
    """The file that was meant by ``kind`` and has a name that no module can have, such as one with a hyphen."""
    files = (path for path in _in_own_folder() if not path.stem.isidentifier())
    return next((path for path in files if _identifier(path.stem) == _identifier(kind)), None)


def _identifier(name: str) -> str:
    return re.sub(r"\W|^(?=\d)", "_", name)


def _in_own_folder() -> list[Path]:
    named = os.environ.get(OWN)
    if not named:
        return []
    folder = Path(named)
    if not folder.is_dir():
        raise InputError(f"{OWN} names {folder}, which is no folder.", next_step=f"Name one that is, or unset {OWN}.")
    return sorted(path for path in folder.glob("*.py") if path.is_file())


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", next_step="Make it readable.") from None


@cache
def _imported(path: Path, source: bytes) -> ModuleType:
    """The module of a file that holds ``source``, run once a process."""
    spec = importlib.util.spec_from_file_location(f"effitrain_own_{path.stem}", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        # The spec's loader might run bytecode of an earlier file, whose hash is not what ``code_of`` says.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        what = "".join(traceback.format_exception_only(error)).strip()
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path} cannot be imported{where}: {what}", next_step=f"Mend it; {_HOW}") from None
    return module


def _checked(module: ModuleType, path: Path) -> type[Adapter]:
    """``ADAPTER`` of the module, which has every part of the contract."""
    cls = getattr(module, "ADAPTER", None)
    if not (isinstance(cls, type) and issubclass(cls, Adapter)):
        raise InputError(f"{path} sets no ADAPTER to a subclass of Adapter.", next_step=f"End it so; {_HOW}")
    own = {name for ancestor in cls.__mro__[: cls.__mro__.index(Adapter)] for name in vars(ancestor)}
    missing = [name for name in _NEEDED if name not in own]
    if missing:
        raise InputError(
            f"{cls.__name__} in {path} has no {' and no '.join(missing)}.",
            "An adapter is saved by its factors as a plain LoRA, and loaded by them: without them all would be lost.",
            f"Add what is missing; {_HOW}",
        )
    return cls
