"""What the stages before training on a pruned model take: scoring, and alignment. Upper bounds, from integers alone.

One layer is in memory at a time; the text is on its way through the layers meanwhile.
"""

from dataclasses import dataclass, replace

from effitrain.core.budget import MemoryBudget
from effitrain.core.choices import best, compute_dtype, list_choices, sequence_length
from effitrain.core.cut import alignment_recipe
from effitrain.core.ledger import DTYPE_BYTES
from effitrain.core.memory import LOSS_CHUNK_BYTES, LOSS_MIN_ROWS, PROCESS_BYTES, saved_bytes
from effitrain.core.recipe import Recipe
from effitrain.core.spec import Axis, LayerSpec, ModelSpec

# What each score looks at, as their files say.
NEEDS = {"random": "nothing", "magnitude": "weights", "wanda": "inputs", "flap": "inputs", "taylor": "gradients"}
# Least squares wants several tokens for every input it solves for: twice the channels of the full FFN, or 64 sequences
# of 256 tokens, which is what the small studies use.
TOKENS_PER_CHANNEL, TOKENS, BATCH_TOKENS = 2, 16_384, 2048
# Host memory for the layer inputs that a gradient score keeps until its backward pass: 3,276 tokens of a 70B model in
# bf16. LLM-Pruner scores with 640 (10 samples of 64).
KEPT_INPUTS = 4 * 2**30


@dataclass(frozen=True)
class Stage:
    """A stage and the bytes it takes, all that is alive then counted; ``leaner`` is the flag that takes less."""

    what: str
    device: int
    host: int
    leaner: str


@dataclass(frozen=True)
class _Sizes:
    """What every stage counts with: the widest layer and linear, tokens of a batch and of all, width of a number."""

    spec: ModelSpec
    recipe: Recipe
    batch: int
    tokens: int
    width: int

    @property
    def layer(self) -> LayerSpec:
        return max((layer for layer, _ in self.spec.shapes), key=lambda layer: layer.weights)

    @property
    def linear(self) -> int:
        return max(linear.weights for linear in self.layer.linears)

    @property
    def walking(self) -> int:
        """A layer, what one batch makes of it, and the rotary tables of all batches."""
        rows = {linear.leaf: linear.out_features for linear in self.layer.linears}
        wide = 3 * rows["gate_proj"] + 2 * rows["q_proj"] + 4 * rows["k_proj"]
        per_token = (6 * self.spec.hidden + wide) * self.width + 8 * self.spec.hidden
        rotary = 2 * self.spec.head_dim * self.width * self.tokens
        return self.layer.params * self.width + self.batch * per_token + rotary

    @property
    def states(self) -> int:
        """Hidden states of the whole text."""
        return self.tokens * self.spec.hidden * self.width


def calibration_tokens(ffn: int) -> int:
    """Tokens that scores and alignment ask for, as far as there is text."""
    return max(TOKENS, TOKENS_PER_CHANNEL * ffn)


def stages(spec: ModelSpec, small: ModelSpec, recipe: Recipe, budget: MemoryBudget) -> list[Stage]:
    """The stages that make ``small`` of ``spec`` as ``recipe`` says; none where it is there, or made up."""
    if recipe.small_model or recipe.weights or small.linear_params == spec.linear_params:
        return []
    length = sequence_length(spec, recipe)
    batch = max(1, BATCH_TOKENS // length) * length
    width = DTYPE_BYTES[compute_dtype(recipe, budget)]
    sizes = _Sizes(spec, recipe, batch, calibration_tokens(spec.ffn) + batch, width)
    fixed = PROCESS_BYTES[budget.device] + 2 * spec.embedding_params * width
    found = [*_scoring(sizes), *_alignment(sizes, small, budget)]
    return [replace(one, device=one.device + budget.overhead_bytes, host=one.host + fixed) for one in found]


def _scoring(sizes: _Sizes) -> list[Stage]:
    needs, c = NEEDS[sizes.recipe.prune_score], sizes.width
    floats = (8 if c == 4 else 12) * sizes.linear  # a matrix in fp32, and two of what is made of it
    if needs == "nothing":
        return []
    if needs == "weights":
        return [Stage("Scoring", sizes.layer.params * c + floats, 0, "--prune-score random")]
    lean = "--prune-score magnitude"
    widest = max(linear.in_features for linear in sizes.layer.linears)
    seen = 16 * sum(linear.in_features for linear in sizes.layer.linears)
    if needs == "inputs":
        return [Stage("Scoring", sizes.walking + seen + max(floats, 8 * sizes.batch * widest), sizes.states, lean)]
    spec, layer = sizes.spec, sizes.layer
    kept = min(sizes.states * spec.num_layers, KEPT_INPUTS) + sizes.batch * spec.hidden * c
    saved = sizes.batch * sum(saved_bytes(layer, spec, sizes.recipe, c))
    backward = 4 * layer.weights + saved + max(floats, (c + 8) * sizes.linear)
    rows = min(sizes.batch, max(LOSS_MIN_ROWS, LOSS_CHUNK_BYTES // (4 * spec.vocab)))
    logits = spec.vocab * (spec.hidden * c + 12 * rows) + 8 * sizes.batch * spec.hidden * c
    return [Stage("Scoring", max(sizes.walking + backward, logits), kept + 3 * kept // spec.num_layers, lean)]


def _alignment(sizes: _Sizes, small: ModelSpec, budget: MemoryBudget) -> list[Stage]:
    recipe, spec = sizes.recipe, sizes.spec
    if recipe.align == "bias":
        sums = 8 * sizes.linear + sizes.batch * (4 * spec.ffn + 24 * spec.hidden)
        return [Stage("Alignment", sizes.walking + sums, sizes.states, "--align none")]
    if recipe.align == "lsq":
        solved = [
            left.in_features
            for whole, layer in zip(spec.layers, small.layers, strict=True)
            for linear, left in zip(whole.linears, layer.linears, strict=True)
            if linear.out_axis == Axis.MODEL and left.in_features < linear.in_features
        ]
        n = max(solved, default=0)
        # float64: the inputs' products and their factor, those with what is left, and the solution in two forms.
        problem = 16 * n * n + 32 * n * spec.hidden + 8 * sizes.batch * (n + 3 * spec.hidden)
        return [Stage("Alignment", sizes.walking + problem, 5 * sizes.states, "--align none")]
    if recipe.align == "train":
        choices = list_choices(small, alignment_recipe(recipe), budget)
        choice = best(choices, budget)
        none = budget.overhead_bytes
        return [Stage("Training the small model", choice.peak - none, choice.host_peak, "--align lsq")]
    return []
