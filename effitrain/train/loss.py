"""The loss of one micro-batch: hidden states from the decoder, head and cross-entropy in chunks."""

from torch import Tensor

from effitrain.data.batches import MicroBatch
from effitrain.kernels.linear_cross_entropy import linear_cross_entropy
from effitrain.model.decoder import Decoder


def loss_sum(decoder: Decoder, batch: MicroBatch) -> Tensor:
    """Sum of the cross-entropies of the batch's trained tokens, float32.

    The caller divides by the trained tokens of the whole step, so accumulation never changes the loss.
    """
    hidden = decoder(batch.input_ids, batch.position_ids, batch.segments)
    head = decoder.lm_head
    trainable = [p for p in head.parameters() if p.requires_grad]
    return linear_cross_entropy(hidden, head, batch.labels, trainable, rows=batch.trained_rows)
