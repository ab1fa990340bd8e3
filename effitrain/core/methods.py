"""What each ``--method`` trains."""

WEIGHTS = ("full", "lisa", "lisa-delta")  # train weights of the model itself, with float32 masters
SAMPLED = ("lisa", "lisa-lora", "lisa-delta")  # train a few layers at a time
METHODS = ("full", *SAMPLED)  # besides the adapter kinds
CHANGES_MODEL = ("full", "lisa")  # leave a model, not an adapter
DEFAULTS = {"full": {"quant": "none"}}  # fields that a method has other defaults for
ADAPTER_LR, WEIGHTS_LR = 2e-4, 1e-5


def adapter_kind(method: str) -> str | None:
    """The adapters that lie on the linears; None where there are none."""
    if method in CHANGES_MODEL:
        return None
    return "lora" if method in SAMPLED else method


def default_lr(method: str) -> float:
    """Peak learning rate where none is given."""
    return WEIGHTS_LR if method in WEIGHTS else ADAPTER_LR
