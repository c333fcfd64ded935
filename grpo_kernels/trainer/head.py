"""The head of the policy, for `--loss-path linear`."""

from transformers import PreTrainedModel

from grpo_kernels.integrations import head
from grpo_kernels.integrations.head import HeadError, ModelHead
from grpo_kernels.trainer.options import OptionError


def find_head(policy: PreTrainedModel) -> ModelHead:
    """`grpo_kernels.integrations.head.find_head`, with the flag to blame.

    Raises:
        OptionError: hidden states and head do not give the policy's own logits.
    """
    try:
        return head.find_head(policy)
    except HeadError as error:
        raise OptionError(
            f"--loss-path linear: {error} Use --loss-path logits; where its logits do not fit, with a smaller "
            "--batch-size."
        ) from None
