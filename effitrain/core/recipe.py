"""The recipe: every choice of a run, as one frozen value. The command line's flags are made from these fields."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from effitrain.core.errors import InputError
from effitrain.core.methods import DEFAULTS
from effitrain.core.names import flag_of, nearest_name
from effitrain.core.rules import contradictions
from effitrain.core.system import ONE_CARD, SEVERAL_CARDS
from effitrain.core.units import parse_bytes


def _bytes(value: Any) -> int:
    try:
        return parse_bytes(value)
    except InputError as error:
        raise ValueError(str(error).replace("\n", " ").rstrip(".")) from None


Bytes = Annotated[int, BeforeValidator(_bytes)]


def _columns(value: Any) -> Any:
    """``prompt=question,completion=answer`` as a dict; a dict stays as it is."""
    if not isinstance(value, str):
        return value
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(name and sign and column for name, sign, column in pairs):
        raise ValueError("write it like prompt=question,completion=answer")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _names(value: Any) -> Any:
    """``q_proj,v_proj`` as a tuple of names."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    """``4,2`` as two numbers."""
    if not isinstance(value, str) or value == "auto":
        return value
    first, sign, last = value.partition(",")
    if not (sign and first.strip().isdecimal() and last.strip().isdecimal()):
        raise ValueError("write it like 4,2")
    return int(first), int(last)


def _auto(value: Any) -> Any:
    """``auto`` stands for None: the plan decides."""
    return None if value == "auto" else value


Auto = BeforeValidator(_auto)


def _flag(default: Any, help: str, *, group: str, **bounds: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"group": group}, **bounds)


class Recipe(BaseModel):
    """Every choice of a run. ``None`` means: decided by the model, the data or the plan.

    Sizes are in bytes, lengths in tokens, ``warmup`` and ``eval_fraction`` are shares of the run and of the data.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = _flag("tiny", "Preset, model folder or hub id", group="model")
    weights: str | None = _flag(
        None, "synthetic[:SEED]: random weights of the model's shape, for rehearsals", group="model",
        pattern=r"^synthetic(:\d+)?$",
    )  # fmt: skip

    dataset: str | None = _flag(None, "File, folder or hub id; the built-in set when left out", group="data")
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"] = _flag(
        "auto", "How the rows are laid out", group="data"
    )
    columns: Annotated[dict[str, str] | None, BeforeValidator(_columns)] = _flag(
        None, "Names of the columns, e.g. prompt=question,completion=answer", group="data"
    )
    template: str = _flag("auto", "Chat template: auto, plain, chatml, llama3, none", group="data")
    train_on_prompt: bool = _flag(False, "Train on the prompt's tokens too", group="data")
    truncation: Literal["right", "left", "drop"] = _flag("right", "What happens to samples too long", group="data")
    packing: bool = _flag(False, "Fill every row with several samples, kept apart", group="data")
    join_documents: bool = _flag(
        False, "Texts laid end to end and cut to exactly --max-seq-len, for long context", group="data"
    )
    eval_dataset: str | None = _flag(None, "Evaluation data; a split of the data when left out", group="data")
    eval_fraction: float = _flag(
        0.05, "Share of the data kept for evaluation, at most 200 rows", group="data", ge=0, lt=1
    )
    eval_every: int | None = _flag(None, "Evaluate every N steps, besides before and after", group="data", ge=1)

    output_dir: str = _flag("effitrain-out", "Folder to write to", group="output", min_length=1)
    save_every: Annotated[int | None, Auto] = _flag(
        None, "Checkpoint every N steps; a tenth of the run", group="output", ge=1
    )
    keep_checkpoints: int = _flag(2, "Checkpoints kept", group="output", ge=1)
    resume: str = _flag("auto", "auto, never, or the checkpoint folder to go on from", group="output")
    report_to: Literal["none", "tensorboard", "wandb"] = _flag("none", "Send metrics to a tracker too", group="output")

    gpu_mem: Annotated[Bytes | None, Auto] = _flag(None, "Device memory budget, e.g. 20G; what is free", group="memory")
    host_mem: Annotated[Bytes | None, Auto] = _flag(None, "Host memory budget; 80 % of what is free", group="memory")
    gpu: str | None = _flag(None, "Plan for a card that is not here, e.g. rtx4090", group="memory")
    fit: Literal["auto", "resident", "stream", "prune"] = _flag("auto", "How the model is made to fit", group="memory")
    prefer: Literal["exact", "fast"] = _flag(
        "exact", "Where it must stream or be pruned: stream first, or prune first", group="memory"
    )
    resident_layers: Annotated[int | None, Auto] = _flag(
        None, "Layers that stay on the device while others stream; as many as fit", group="memory", ge=0
    )
    stream_order: Literal["auto", "layer", "micro-batch"] = _flag(
        "auto", "What comes first where layers stream: all micro-batches in a layer, or all layers", group="memory"
    )
    quant: Literal["nf4", "none"] = _flag("nf4", "Storage of the frozen weights", group="memory")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = _flag(
        "auto", "Compute dtype; bf16 on CUDA, fp32 on CPU", group="memory"
    )
    recompute: Literal["auto", "none", "mlp", "layer"] = _flag(
        "auto", "What the backward pass computes again", group="memory"
    )
    offload_activations: Literal["auto", "on", "off"] = _flag(
        "auto", "Layer inputs wait for the backward pass in host memory", group="memory"
    )

    mlp_tiles: Annotated[int | None, Auto] = _flag(
        None, "Tiles of tokens that norms and MLPs take one by one; where only that fits", group="memory", ge=1
    )

    max_seq_len: Annotated[int | None, Auto] = _flag(
        None, "Tokens of a sample, beyond the model's length too; its length, at most 2048", group="training", ge=8
    )
    attention: Literal["full", "s2"] = _flag(
        "full", "Attention in training; s2 is shifted sparse attention, for long context", group="training"
    )
    s2_group: Annotated[int | None, Auto] = _flag(
        None, "Tokens of a group of --attention s2, even; a quarter of --max-seq-len", group="training",
        ge=2, multiple_of=2,
    )  # fmt: skip
    rope_scaling: Literal["auto", "none", "linear", "ntk", "yarn"] = _flag(
        "auto", "How positions beyond the model's length are scaled; linear where there are such", group="training"
    )
    rope_factor: Annotated[float | None, Auto] = _flag(
        None, "How many times the model's length; as many as --max-seq-len takes", group="training", gt=1
    )
    batch_size: Annotated[int | None, Auto] = _flag(None, "Samples a micro-step; from the plan", group="training", ge=1)
    grad_accum: Annotated[int | None, Auto] = _flag(
        None, "Micro-steps a step; from the plan, 16 samples a step", group="training", ge=1
    )
    lr: Annotated[float | None, Auto] = _flag(
        None,
        "Peak learning rate; 2e-4 for adapters, 1e-5 for weights, 5e-3 for the built-in model",
        group="training",
        gt=0,
    )
    schedule: Literal["cosine", "linear", "constant"] = _flag(
        "cosine", "Learning-rate schedule; cosine ends at 10 %", group="training"
    )
    warmup: float = _flag(0.03, "Warm-up, as a share of the run", group="training", ge=0, lt=1)
    epochs: float = _flag(1.0, "Passes over the data; 3 for the built-in model", group="training", gt=0)
    max_steps: int | None = _flag(None, "Train for N steps, whatever --epochs says", group="training", ge=1)
    seed: int = _flag(42, "Seed of every random choice", group="training", ge=0, lt=2**63)
    weight_decay: float = _flag(0.0, "AdamW weight decay", group="training", ge=0)
    max_grad_norm: float = _flag(1.0, "Gradient clipping; 0 turns it off", group="training", ge=0)
    optimizer: Annotated[Literal["adamw", "adamw8bit", "paged-adamw8bit"] | None, Auto] = _flag(
        None, "Optimizer; adamw, or adamw8bit where only that fits", group="training"
    )

    method: str = _flag(
        "lora",
        "What is trained: adapters (lora, your own), every weight (full), layers by turns (lisa ...)",
        group="adapter",
    )
    lora_r: int = _flag(16, "Rank", group="adapter", ge=1)
    lora_alpha: float = _flag(32.0, "Alpha; the update is scaled by alpha / r", group="adapter", gt=0)
    lora_dropout: float = _flag(0.0, "Dropout on the adapter's input", group="adapter", ge=0, lt=1)
    lora_targets: Annotated[tuple[str, ...] | None, BeforeValidator(_names), Auto] = _flag(
        None, "Linears to adapt, e.g. q_proj,v_proj,lm_head; all decoder linears", group="adapter"
    )
    lora_rslora: bool = _flag(False, "Scale by alpha / sqrt(r) instead of alpha / r", group="adapter")
    train_norms: bool = _flag(False, "Train the norms in full beside the adapter", group="adapter")
    train_embeddings: bool = _flag(
        False, "Train the token embedding's rows, in host memory, beside the adapter", group="adapter"
    )
    init_adapter: str | None = _flag(None, "Go on from this adapter folder", group="adapter", min_length=1)

    lisa_layers: int = _flag(2, "Layers trained at a time", group="lisa", ge=1)
    lisa_interval: int = _flag(10, "Steps between changes of layers", group="lisa", ge=1)
    lisa_sampling: Literal["uniform", "shuffle", "norm", "outliers"] = _flag(
        "uniform", "Which layers: any, all in turn, or more often those of large weights or many outliers", group="lisa"
    )
    lisa_state: Literal["reset", "keep-host"] = _flag(
        "reset", "Optimizer states of layers that leave: dropped, or kept in host memory", group="lisa"
    )
    lisa_train_embeddings: Annotated[bool | None, Auto] = _flag(
        None, "Train embedding, head and last norm too; up to 3B parameters", group="lisa"
    )

    prune_ratio: float | None = _flag(
        None, "Share of the pruned parts that goes; the smallest that fits", group="pruning", ge=0, lt=1
    )
    prune_parts: Literal["ffn+kv", "ffn", "kv"] = _flag(
        "ffn+kv", "What is pruned: FFN channels, KV heads with their query heads", group="pruning"
    )
    prune_method: Literal["loram", "loraprune"] = _flag(
        "loram", "loram: train small, infer large; loraprune: prune while training, for a small model", group="pruning"
    )
    prune_score: Literal["random", "magnitude", "wanda", "flap", "taylor"] = _flag(
        "wanda", "What decides which channels and heads stay", group="pruning"
    )
    prune_ranking: Literal["local", "global"] = _flag(
        "local", "What competes: the channels or heads of one layer, or those of all layers", group="pruning"
    )
    prune_round: Annotated[int | None, Auto] = _flag(
        None, "Kept FFN channels are a multiple of N; 256 for large models", group="pruning", ge=1
    )
    prune_exempt: Annotated[tuple[int, int] | None, BeforeValidator(_pair), Auto] = _flag(
        None, "First and last layers left whole, e.g. 4,2; in proportion to 80", group="pruning"
    )
    align: Literal["none", "lsq", "bias", "train"] = _flag(
        "lsq", "How the small model is brought closer to the full one", group="pruning"
    )
    calib_dataset: str | None = _flag(
        None, "Text for scores and alignment; the training data when left out", group="pruning", min_length=1
    )
    small_model: str | None = _flag(
        None, "A pruned folder to train on, instead of pruning now", group="pruning", min_length=1
    )

    @property
    def asks_to_prune(self) -> bool:
        """Whether it prunes whatever the plan finds: who names a ratio, a small model or LoRAPrune wants it."""
        named = self.prune_ratio is not None or self.small_model is not None or self.prune_method == "loraprune"
        return named or self.fit == "prune"

    def changed(self, **fields: Any) -> "Recipe":
        """A copy with ``fields`` replaced, validated again."""
        return make_recipe({**self.model_dump(), **fields})

    @classmethod
    def fields_in(cls, group: str) -> tuple[str, ...]:
        """The fields of a group: ``model``, ``data``, ``output``, ``memory``, ``training``, ``adapter``, ``lisa`` or
        ``pruning``.
        """
        extra = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return tuple(name for name, more in extra.items() if more == {"group": group})

    def to_yaml(self) -> str:
        """The recipe as YAML that ``--config`` reads back to an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def result_fields(self) -> dict[str, Any]:
        """The fields that decide the result, for JSON: not where it goes, nor how it is watched."""
        return self.model_dump(mode="json", exclude=RUNTIME_FIELDS)


# Fields that change where a run goes or how it is watched, never what it computes.
RUNTIME_FIELDS = {"output_dir", "resume", "report_to", "save_every", "keep_checkpoints", "gpu_mem", "host_mem", "gpu"}


def make_recipe(fields: dict[str, Any]) -> Recipe:
    """A checked recipe from raw fields (flags, YAML or keyword arguments).

    Raises:
        InputError: names every bad field at once, an unknown key with the nearest valid one.
    """
    fields = {**DEFAULTS.get(str(fields.get("method")), {}), **fields}
    problems = [_unknown(key) for key in fields if key not in Recipe.model_fields]
    known = {key: value for key, value in fields.items() if key in Recipe.model_fields}
    recipe = None
    try:
        recipe = Recipe.model_validate(known)
    except ValidationError as error:
        problems += [_describe(item) for item in error.errors()]
    except InputError as error:
        problems.append(str(error))
    clashes = list(contradictions(recipe)) if recipe else []
    if problems or clashes or recipe is None:
        step = "`effitrain run --help` lists every flag." if problems else "Leave one of the two out, or change it."
        raise InputError("\n".join([*problems, *clashes]), next_step=step)
    return recipe


_LIKE = "Write lines like 'model: tiny'; recipe.yaml of any run folder is an example."


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """The raw fields of a recipe in YAML; kebab-case keys are accepted.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The recipe {path} cannot be read: {error.strerror}.", next_step="Check --config.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe {path} is not valid YAML: {error}", next_step=_LIKE) from None
    if not isinstance(fields, dict):
        raise InputError(f"The recipe {path} does not hold keys and values.", next_step=_LIKE)
    return {str(key).replace("-", "_"): value for key, value in fields.items()}


def _unknown(key: str) -> str:
    if key in SEVERAL_CARDS:
        return f"Unknown key {key!r}. {ONE_CARD}"
    nearest = nearest_name(key, Recipe.model_fields)
    return f"Unknown key {key!r}." + (f" Did you mean {nearest!r}?" if nearest else "")


def _describe(item: Any) -> str:
    field = str(item["loc"][0])
    message = item["msg"].removeprefix("Value error, ")
    end = "" if message.endswith("?") else "."
    return f"{flag_of(field)} {item['input']!r}: {message[0].lower()}{message[1:]}{end}"
