"""Tokenizers for the data tests: byte-level ones made here, whose ids decode to exactly the text they came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """``make_tokenizer(specials, bos, eos, add_bos)``: a byte-level tokenizer that merges runs of spaces and lines.

    Its post-processor trims spaces out of the offsets, as that of Llama 3 does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(specials: tuple[str, ...] = (), bos: str = "<s>", eos: str = "</s>", add_bos: bool = True) -> Any:
        names = list(dict.fromkeys([bos, eos, *specials]))
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=names,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        text = "def f(x):\n        return    x\n\n\n### Instruction:\nsay hello hello\n\n### Response:\nhello there"
        inner.train_from_iterator([text], trainer)
        steps = [processors.ByteLevel(trim_offsets=True)]
        if add_bos:
            steps.append(processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, names.index(bos))]))
        inner.post_processor = processors.Sequence(steps)
        return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """A byte-level tokenizer that puts ``<s>`` before every text; do not change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def stories(data_dir: Path) -> Any:
    """The tokenizer of a real small Llama (SentencePiece pieces, byte fallback, ``<s>`` before every text)."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_dir / "models" / "stories3M")
