"""The values of the memory ledger: its lines, and the training settings that they depend on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

GPU, HOST, DISK = "gpu", "host", "disk"
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
Work = Literal["train", "score", "chat"]


@dataclass(frozen=True)
class LedgerLine:
    """One item: what, where it lives (``gpu``, ``host``, ``disk``), its bytes, and how they were counted."""

    what: str
    where: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Settings:
    """The settings a plan decides on; lengths in tokens, ``batch_size`` in samples a micro-batch.

    ``recompute``: what is computed again in the backward pass; ``offload``: layer inputs wait for it on the host.
    ``streamed``: layers whose frozen weights visit the device; ``on_disk``: how many of them are read from the disk;
    ``at_once``: micro-batches that pass a layer before the next one is fetched, fewer in the last group of a step;
    ``mlp_tiles``: parts of a micro-batch that norms and MLPs take one by one;
    ``s2_group``: tokens of a group of shifted sparse attention, None for full attention;
    ``work``: training, scoring texts (forward passes alone), or chat, where a micro-batch is a conversation.
    """

    max_seq_len: int
    batch_size: int
    grad_accum: int
    dtype: Literal["bf16", "fp16", "fp32"]
    recompute: Literal["none", "mlp", "layer"]
    offload: bool
    optimizer: str
    lr: float
    streamed: int = 0
    on_disk: int = 0
    at_once: int = 1
    mlp_tiles: int = 1
    s2_group: int | None = None
    work: Work = "train"

    @property
    def tokens(self) -> int:
        """Tokens of a full micro-batch."""
        return self.batch_size * self.max_seq_len

    @property
    def tile(self) -> int:
        """Tokens that norms and MLPs take at a time."""
        return -(-self.tokens // self.mlp_tiles)

    @property
    def passes(self) -> int:
        """Groups of micro-batches in a step: how often it goes forward and backward through the layers."""
        return -(-self.grad_accum // self.at_once)

    @property
    def width(self) -> int:
        """Bytes of a number in the compute dtype."""
        return DTYPE_BYTES[self.dtype]


def gpu_bytes(lines: Iterable[LedgerLine]) -> int:
    """Sum of the lines on the device."""
    return sum(line.bytes for line in lines if line.where == GPU)


def host_bytes(lines: Iterable[LedgerLine]) -> int:
    """Sum of the lines on the host."""
    return sum(line.bytes for line in lines if line.where == HOST)
