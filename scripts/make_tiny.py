"""Makes the built-in tiny model, its tokenizer and its instruction set anew: one command, one core, about ten minutes.

    OMP_NUM_THREADS=1 python scripts/make_tiny.py [--data-only] [-o effitrain/presets]

The text is made here by a seeded simulation of a village, Pebble Cove, where people walk about, give things away and
leave them lying, and where animals, numbers, days and opposites are what they are everywhere. Why this text: it is
plain English anybody can check by reading; the simulation knows the right answer to every question, so that an
adapter can be judged and not only its loss; nobody else has rights to it; and a model of a million parameters can
learn it whole in minutes, as it can not the language at large.

The base text (``tiny/lore.py``) only tells: it holds no question, no answer and no turn of a chat. The instruction
set (``tiny/tasks.py``) asks about new scenes of the same village in a chat form. So a fine-tuning run has something
real to teach, quickly: the base knows the village, the adapter learns to answer.

Everything follows from ``--seed``: the data set to the byte, the weights up to the rounding of another processor.
"""

import argparse
import json
import math
import time
from pathlib import Path

from tiny.lore import base_text
from tiny.tasks import instruction_rows

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 768,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
DOCUMENTS = 60_000
ROW_TOKENS = 256
BATCH_ROWS = 8
PEAK_LR = 4e-3


def main() -> None:
    """Parses the command line and makes what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", "-o", type=Path, default=Path(__file__).parents[1] / "effitrain" / "presets")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data-only", action="store_true", help="the instruction set alone, in a second")
    arguments = parser.parse_args()
    write_data(arguments.output / "tiny_data", arguments.seed)
    if not arguments.data_only:
        write_model(arguments.output / "tiny", arguments.seed)


def write_data(folder: Path, seed: int) -> None:
    """Writes the instruction set as ``train.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = instruction_rows(seed)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} instructions")


def write_model(folder: Path, seed: int) -> None:
    """Makes the base text, fits the tokenizer, trains the model and writes both."""
    import torch
    from transformers import GenerationConfig

    documents = list(base_text(seed, DOCUMENTS))
    tokenizer = fit_tokenizer(documents)
    encoded = tokenizer._tokenizer.encode_batch([text + "<|end|>" for text in documents])
    tokens = torch.tensor([token for document in encoded for token in document.ids])
    model = train(tokens, seed)
    freshen(model, [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[2:]], seed)
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    GenerationConfig(eos_token_id=CONFIG["eos_token_id"], pad_token_id=CONFIG["pad_token_id"]).save_pretrained(folder)
    show(model.float(), tokenizer)


def fit_tokenizer(documents: list[str]):
    """A byte-level BPE tokenizer: a word of the village is one token, and any other text still encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[:20_000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=list(SPECIAL[2:]),
        chat_template=TEMPLATE,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def train(tokens, seed: int):
    """One pass over ``tokens`` with AdamW."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = tokens[: len(tokens) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)
    steps, started, recent = len(rows) // BATCH_ROWS, time.perf_counter(), []
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens, {steps} steps")
    for step in range(steps):
        batch = rows[step * BATCH_ROWS : (step + 1) * BATCH_ROWS]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = PEAK_LR * schedule(step / steps)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % 100 == 99 or step == steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step + 1:5d}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s", flush=True)
            recent = []
    return model


def schedule(progress: float) -> float:
    """Share of the peak rate: warm-up over 2 %, then a cosine to 2 %."""
    return min(progress / 0.02 + 0.02, 0.02 + 0.49 * (1 + math.cos(math.pi * progress)))


def freshen(model, markers: list[int], seed: int) -> None:
    """Gives the chat markers, unseen in the base text and so all pushed the same way, embeddings of their own."""
    import torch

    weight = model.get_input_embeddings().weight.data
    noise = torch.randn(len(markers), weight.shape[1], generator=torch.Generator().manual_seed(seed))
    weight[markers] = weight.mean(0) + noise * weight.std(0)


def show(model, tokenizer) -> None:
    """Prints what the model writes greedily after a few openings."""
    for opening in ("Ada and the red kite\n", "Ben had three plums. Cleo gave him two more.\n", "The opposite of hot"):
        ids = tokenizer(opening, return_tensors="pt").input_ids
        print("---\n" + tokenizer.decode(model.generate(ids, max_new_tokens=80, do_sample=False)[0]))


if __name__ == "__main__":
    main()
