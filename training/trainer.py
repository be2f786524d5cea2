"""The trainer: a model made trainable as a recipe says, its optimizer, and one step of both. The loop around it is `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from idefics2_fast import Batch, Idefics2, ops
from idefics2_fast.adapters import adapted, attach_adapters, refresh_norms
from idefics2_fast.kernels.segments import Segments
from idefics2_fast.training import optim
from idefics2_fast.training.parallel import Ranks, shard
from idefics2_fast.training.plan import step_flops
from idefics2_fast.training.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# An image's patches among all of a step: the index of its first token, then so many bits for the patch.
PATCH_BITS = 24


@dataclass(frozen=True)
class Losses:
    """What one forward and backward pass over a step's batches gave, on all ranks together.

    Attributes:
        loss: mean cross-entropy of the trained tokens of all ranks.
        mine: the same of this rank's, for finding a faulty one.
        grad_norm: of the whole gradient, before clipping.
        trained, images: tokens with loss, and images, of all ranks.
        flops: of the model's forward and backward pass, all ranks, without what is computed twice.
    """

    loss: float
    mine: float
    grad_norm: float
    trained: int
    images: int
    flops: float


class Trainer:
    """A model that is trained in place.

    Args:
        model: on the ranks' device, the same on every rank.
        new_tokens: ids whose embedding and head rows "new_tokens" trains.

    Raises:
        ValueError: a recipe that trains nothing of this model.
    """

    def __init__(self, model: Idefics2, recipe: Recipe, ranks: Ranks, new_tokens: Sequence[int] = ()) -> None:
        self.model, self.recipe, self.ranks = model, recipe, ranks
        _choose_trained(model, recipe)
        for layer in (*model.vision_model.layers, *model.text_model.layers):
            if recipe.compile:
                _compile(layer.mlp)
            _checkpoint(layer, recipe.checkpointing)
        self.replicated = [layer.magnitude for layer in adapted(model).values() if layer.magnitude is not None]
        shard(model, ranks, DTYPES[recipe.dtype], ignored=set(self.replicated))
        register_fsdp_forward_method(model, "loss_sum")
        by_rows = _train_rows(model, new_tokens) if "new_tokens" in recipe.trained and recipe.adapter != "full" else []
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optim.adamw(model.named_parameters(), recipe, by_rows)
        refresh_norms(model)
        model.train()

    def accumulate(self, batches: Sequence[Batch], step: int) -> Losses:
        """Gradients of the mean loss over the trained tokens of all ranks' batches: forward, backward, reduction. A collective."""
        trained, images = self.ranks.sum(
            sum(batch.answer_rows.shape[0] for batch in batches), sum(len(batch.images or ()) for batch in batches)
        )
        total = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            self.model.set_requires_gradient_sync(index == len(batches) - 1)
            loss = self._loss(batch.to(self.ranks.device), step)
            # FSDP averages over the ranks; the sum is wanted
            (loss * (self.ranks.world / max(trained, 1))).backward()
            total += loss.detach()
        self._reduce_replicated()
        norm = optim.clip(self.parameters, self.recipe.clip)
        mine = max(1, sum(batch.answer_rows.shape[0] for batch in batches))
        whole, flops = self.ranks.sum(total.item(), sum(map(self._flops, batches)))
        return Losses(whole / max(trained, 1), total.item() / mine, norm.item(), int(trained), int(images), flops)

    def update(self, step: int) -> float:
        """One step of the optimizer, the gradients cleared, the norms of DoRA refreshed; returns the learning rate. A collective."""
        value = optim.rate(self.recipe, step)
        optim.set_rate(self.optimizer, value)
        self.optimizer.step()
        self.skip()
        refresh_norms(self.model)
        return value

    def skip(self) -> None:
        """Clears the gradients."""
        self.optimizer.zero_grad()

    def restored(self) -> None:
        """To be called when the weights were loaded: what is derived from them is made anew. A collective."""
        self.skip()
        refresh_norms(self.model)

    def _loss(self, batch: Batch, step: int) -> Tensor:
        batch = batch if batch.patches is not None else with_unread_image(batch)
        self._draw_for(batch, step)
        total, _ = self.model.loss_sum(batch, noise=self._noise(batch, step), z_loss=self.recipe.z_loss)
        return total

    def _noise(self, batch: Batch, step: int) -> ops.Noise | None:
        """NEFTune: L is the length of each token's own document; image rows get none unless asked."""
        recipe = self.recipe
        if not recipe.neftune_alpha:
            return None
        drawn_for = {"alpha": recipe.neftune_alpha, "seed": recipe.seed, "step": step, "token_base": batch.token_base}
        return ops.Noise.of(batch.documents, **drawn_for, images=recipe.noise_images)

    def _draw_for(self, batch: Batch, step: int) -> None:
        """Tells the adapters' dropout which rows it sees, by their global indices."""
        layers = adapted(self.model)
        if not layers or not self.recipe.dropout:
            return
        dropout = next(iter(layers.values())).dropout
        dropout.step = step
        tokens = batch.token_base + torch.arange(batch.token_ids.shape[0], device=batch.device)
        firsts = batch.image_rows[:: self.model.config.perceiver.n_latents]
        images = torch.tensor(batch.images.lengths, device=batch.device)
        patches = torch.arange(batch.images.total, device=batch.device) - batch.images.offsets[:-1].repeat_interleave(images)
        if firsts.shape[0]:
            patches = patches + ((batch.token_base + firsts) << PATCH_BITS).repeat_interleave(images)
        dropout.rows = {"text": tokens, "vision": patches}

    def _reduce_replicated(self) -> None:
        """The mean over the ranks of the gradients that FSDP does not look after."""
        grads = [p.grad for p in self.replicated if p.grad is not None]
        if grads and self.ranks.world > 1:
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            for grad, part in zip(grads, flat.div_(self.ranks.world).split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def _flops(self, batch: Batch) -> float:
        images = batch.images.lengths if batch.images else ()
        return step_flops(self.model.config, self.recipe, batch.documents.lengths, images, batch.answer_rows.shape[0])


def with_unread_image(batch: Batch) -> Batch:
    """The batch with an image of one patch that no token stands for: its rank joins the collectives of the vision tower."""
    device = batch.device
    return Batch(
        **{
            **vars(batch),
            "patches": torch.zeros(1, 588, dtype=torch.uint8, device=device),
            "patch_positions": torch.zeros(1, dtype=torch.int64, device=device),
            "images": Segments.of_lengths([1], device),
            "image_rows": torch.zeros(0, dtype=torch.int64, device=device),
        }
    )


def _choose_trained(model: Idefics2, recipe: Recipe) -> None:
    """Adapters and `requires_grad` as the recipe says; what is trained is fp32, what is not has the recipe's dtype."""
    model.to(DTYPES[recipe.dtype])
    parts = {"vision": model.vision_model, "connector": model.connector, "text": model.text_model, "head": model.lm_head}
    if recipe.adapter == "full":
        model.requires_grad_(True)
    else:
        attach_adapters(
            model,
            rank=recipe.rank,
            alpha=recipe.alpha,
            dora=recipe.adapter == "dora",
            targets=recipe.targets,
            dropout=recipe.dropout,
            seed=recipe.seed,
        )
        for part in set(recipe.trained) & set(parts):
            parts[part].requires_grad_(True)
        if "new_tokens" in recipe.trained:
            model.text_model.embed_tokens.requires_grad_(True)
            model.lm_head.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _train_rows(model: Idefics2, rows: Sequence[int]) -> list[nn.Parameter]:
    """Of embedding and head, which are returned, only these rows are trained: the gradients of all others are zeroed at once."""
    weights = [model.text_model.embed_tokens.weight, model.lm_head.weight]
    for weight in weights:
        kept = torch.zeros(weight.shape[0], 1, device=weight.device)
        kept[list(rows)] = 1
        if isinstance(weight, DTensor):
            kept = distribute_tensor(kept, weight.device_mesh, weight.placements)
        weight.register_post_accumulate_grad_hook(partial(_keep_rows, kept=kept))
    return weights


def _keep_rows(parameter: Tensor, kept: Tensor) -> None:
    parameter.grad.mul_(kept)


SAVED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _checkpoint(layer: nn.Module, how: str) -> None:
    """Recomputes a layer's activations in the backward pass: all, or all but attention's outputs. Nothing is drawn from generators."""
    if how == "none":
        return
    more = {} if how == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **more)


def _compile(mlp: nn.Module) -> None:
    """Compiles what is row-wise: activation functions, and what adapters add to products. Attention's borders are numbers on the host,
    others in each batch: a graph with attention in it would be compiled anew in every step.

    A layer's number is part of its guards, hence the limit: a variant for each layer, with and without gradients to its input.
    """
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    mlp.forward = torch.compile(mlp.forward)


def _policy(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in SAVED else CheckpointPolicy.PREFER_RECOMPUTE
