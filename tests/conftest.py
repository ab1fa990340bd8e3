"""What every test gets: no network, its own cache, fixed seeds, no thread left behind; data, models and the command
line to ask for."""

import hashlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for what module fixtures run, before any test has its own; no variable left that the command sets; one
    font cache a session, since making it takes a second.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, no cache of the user, the same random numbers whatever ran before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("HF_HOME", raising=False)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    """Fails the test whose threads outlive it by a second. tqdm keeps one for the whole process, and so does torch's
    compiler, in a pool without a name; ours have names.
    """
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 1
    for thread in set(threading.enumerate()) - before:
        compiler = thread.name.startswith("ThreadPoolExecutor-") and "torch._inductor.async_compile" in sys.modules
        if not compiler and type(thread).__name__ not in ("TMonitor", "_DummyThread"):
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"thread {thread.name!r} still runs after the test"


@pytest.fixture(scope="session")
def effitrain() -> Callable[..., Answer]:
    """``effitrain(*arguments)``: the command line, in this process for speed."""

    def call(*arguments: object) -> Answer:
        from effitrain.cli.main import main

        out, err = io.StringIO(), io.StringIO()
        with pytest.raises(SystemExit) as end, redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        return Answer(end.value.code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def digests() -> Callable[..., dict[str, tuple[str, int]]]:
    """``digests(*folders)``: hash and time of change of every file below them, by path."""

    def of(*folders: Path) -> dict[str, tuple[str, int]]:
        files = (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}

    return of


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and texts that EFFITRAIN_DATA names; the test is skipped without it."""
    folder = os.environ.get("EFFITRAIN_DATA")
    if not folder:
        pytest.skip("needs real data: set EFFITRAIN_DATA to the folder that holds it")
    assert Path(folder).is_dir(), f"EFFITRAIN_DATA names {folder}, which is no folder"
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model(family, tied, layers, hidden, heads, kv_heads, ffn)``: the folder of a random float32 model.

    It holds config, safetensors and a byte-level tokenizer of 259 tokens, and is made once a session: do not change it.
    No weight keeps its initial value, so that a bias or norm that was never loaded shows.
    """

    @cache
    def make(
        family: str = "llama",
        tied: bool = False,
        layers: int = 2,
        hidden: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        ffn: int = 112,
    ) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(family)
        tokenizer = _byte_tokenizer()
        tokenizer.save_pretrained(folder)
        config = AutoConfig.for_model(
            family,
            vocab_size=len(tokenizer) + 2,  # more rows than tokens, as real models have
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads,
            max_position_embeddings=512,
            tie_word_embeddings=tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        return folder

    return make


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
