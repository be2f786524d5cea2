"""The loss of answer rows alone: the head never sees the others.

Logits follow Liger's convention, which Trainer knows: the keyword `skip_logits` says whether to leave them out. By default they are left
out (None) in training where labels are given, and made otherwise, as evaluation and `generate` need them. TRL's `SFTTrainer` brings a head
of its own, which calls the model beneath: that part of the patch works under it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from idefics2_fast import ops
from idefics2_fast.patching.ledger import by_name, is_plain

IGNORED = -100


def causal_lm(self: nn.Module, original: Callable[..., Any], *args: Any, skip_logits: bool | None = None, **kwargs: Any) -> Any:
    """Idefics2ForConditionalGeneration.forward. `logits_to_keep` other than 0, and a loss function of the user's, get Hugging Face's path.

    Raises:
        ValueError: `skip_logits=True` without labels; labels of another shape than the tokens.
    """
    kwargs = by_name(original, args, kwargs)
    labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
    if skip_logits and labels is None:
        raise ValueError("skip_logits is True, expected labels with it")
    skip = self.training if skip_logits is None else skip_logits
    if labels is None or not skip or not (isinstance(keep, int) and keep == 0) or not _is_causal_lm_loss(self.loss_function):
        return original(**kwargs)
    from transformers.models.idefics2.modeling_idefics2 import Idefics2CausalLMOutputWithPast

    return_dict = kwargs.pop("return_dict", None)
    given = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
    outputs = self.model(**given, return_dict=True)
    settings = {name: kwargs[name] for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in kwargs}
    output = Idefics2CausalLMOutputWithPast(
        loss=answer_loss(self.lm_head, outputs.last_hidden_state, labels, **settings),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        image_hidden_states=outputs.image_hidden_states,
    )
    return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _is_causal_lm_loss(function: Callable[..., Any]) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss


def answer_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """transformers' ForCausalLMLoss of hidden states [B, S, C], from the rows whose next token is an answer.

    Args:
        labels: int64 [B, S]; position s learns label s + 1.
        num_items_in_batch: divisor of the sum; None for the number of answer rows.
        shift_labels: [B, S], taken in place of shifted labels.

    Raises:
        ValueError: labels of another shape.
    """
    targets = (labels if shift_labels is None else shift_labels).to(hidden.device)
    targets = targets if ignore_index == IGNORED else targets.masked_fill(targets == ignore_index, IGNORED)
    rows, targets = ops.answer_rows(hidden, targets, shifted=shift_labels is not None)
    if is_fused(head):
        total, _ = ops.linear_cross_entropy(rows, head.weight, targets)
    else:
        total = F.cross_entropy(head(rows).float(), targets, reduction="sum")
    if num_items_in_batch is None:
        return total / targets.new_tensor(targets.shape[0])
    return total / (num_items_in_batch.to(total.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


def is_fused(head: nn.Module) -> bool:
    """Whether the head is a matrix and nothing else: not wrapped, hooked, quantised, sharded or elsewhere."""
    return is_plain(head, nn.Linear) and head.bias is None and type(head.weight) is nn.Parameter and not head.weight.is_meta
