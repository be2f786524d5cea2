"""What a run will take: memory of each GPU, FLOPs and time of a step; from the configurations alone, no tensor made.

Weights, masters, gradients and Adam's moments are exact. Activations are those that the backward pass needs, counted per row of each layer
(see `_kept`), and what the layer holds besides that the backward pass is in; what only lives inside one op is not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from idefics2_fast import counters
from idefics2_fast.config import Idefics2Config
from idefics2_fast.training.recipe import Recipe

BYTES = {"bfloat16": 2, "float32": 4}
PEAK_FLOPS = 989e12  # of an H100 or H200 in bf16, dense (NVIDIA's data sheet)
CARD = 80e9
CONTEXT = 3e9  # CUDA's context, NCCL's buffers, what the allocator cannot use
# What needs a gradient that has come through a part, if it is trained itself.
BEHIND = {
    "vision": {"vision"},
    "connector": {"vision", "connector"},
    "text": {"vision", "connector", "text", "new_tokens"},
    "head": {"vision", "connector", "text", "new_tokens"},
}
IMAGE_PATCHES = 70 * 70  # an image of 980 x 980
CHUNK = 1 << 28  # logits at a time, as in kernels/linear_cross_entropy.py


class Trained(NamedTuple):
    """Parameters that are trained, by what they are; magnitudes stand whole on every rank."""

    adapters: int
    magnitudes: int
    whole: int

    @property
    def total(self) -> int:
        return sum(self)


class Plan(NamedTuple):
    """Bytes on each GPU, and the work of a step on all of them.

    Attributes:
        frozen: this rank's shard of the weights that are not trained, in the recipe's dtype.
        masters, gradients, moments: fp32, this rank's shards, and the magnitudes whole.
        gathered: weights of the layers that are whole at one time: embedding and head, and two neighbouring layers.
        activations: of one pack, until its backward pass.
        working: of the layer that the backward pass is in: activations made anew, and gradients.
        logits: a chunk, and the head's gradient where it is trained.
        context: an allowance.
        flops: forward and backward of a step, nothing counted twice.
    """

    frozen: float
    masters: float
    gradients: float
    moments: float
    gathered: float
    activations: float
    working: float
    logits: float
    context: float
    flops: float

    @property
    def memory(self) -> float:
        return sum(self) - self.flops

    def seconds(self, gpus: int, mfu: float) -> float:
        """Of a step, at a share of the peak."""
        return self.flops / (gpus * PEAK_FLOPS * mfu)


def plan(config: Idefics2Config, recipe: Recipe, gpus: int = 1) -> Plan:
    """The plan of a recipe on some GPUs, its packs full: one document, images of 980 x 980.

    Raises:
        ValueError: GPUs that the packs cannot be dealt to.
    """
    if gpus < 1 or recipe.packs % gpus:
        raise ValueError(f"gpus is {gpus}, expected a number that packs = {recipe.packs} is a multiple of")
    size, parts, trained = BYTES[recipe.dtype], counters.count_parameters(config), count_trained(config, recipe)
    sharded = (trained.adapters + trained.whole) / gpus + trained.magnitudes
    heads = trained.whole and _head_is_trained(recipe)
    activations, working = _activations(config, recipe)
    chunk = min(recipe.tokens, max(16, CHUNK // config.text.vocab_size)) * config.text.vocab_size * (4 + size)
    return Plan(
        frozen=size * (parts.total - trained.whole) / gpus,
        masters=4 * sharded,
        gradients=4 * sharded,
        moments=8 * sharded,
        gathered=size * (2 * parts.head + 2 * _largest_group(config, recipe)),
        activations=activations,
        working=working,
        logits=chunk + (4 * parts.head if heads else 0),
        context=CONTEXT,
        flops=recipe.packs * step_flops(config, recipe, [recipe.tokens], _images(recipe.patches), recipe.tokens),
    )


def step_flops(config: Idefics2Config, recipe: Recipe, documents: Sequence[int], images: Sequence[int], head_rows: int) -> float:
    """Forward, and backward: as much again in the parts that a gradient passes through, and again for weights where they are trained.

    What adapters add is left out.
    """
    parts = counters.forward_flops(config, documents, images, head_rows=head_rows)
    flops = {"vision": parts.vision, "connector": parts.connector, "text": parts.text, "head": parts.head}
    whole = set(flops) if recipe.adapter == "full" else set(recipe.trained) & set(flops)
    learning = whole | ({*recipe.targets, *recipe.trained} if recipe.adapter != "full" else set())
    passed = [part for part, behind in BEHIND.items() if learning & behind]
    return float(parts.total + sum(flops[part] for part in passed) + sum(flops[part] for part in whole))


def count_trained(config: Idefics2Config, recipe: Recipe) -> Trained:
    """What `Trainer` makes trainable."""
    parts = counters.count_parameters(config)
    whole = {"vision": parts.vision, "connector": parts.connector, "text": parts.text, "head": parts.head}
    if recipe.adapter == "full":
        return Trained(0, 0, parts.total)
    rows_of_tokens = parts.head * 2 if "new_tokens" in recipe.trained else 0
    linears = [linear for part in recipe.targets for linear in _linears(config, part)]
    return Trained(
        adapters=sum(recipe.rank * (projections * width + out) for projections, width, out in linears),
        magnitudes=sum(out for _, _, out in linears) if recipe.adapter == "dora" else 0,
        whole=sum(whole[part] for part in set(recipe.trained) & set(whole)) + rows_of_tokens,
    )


def too_large(plan: Plan, recipe: Recipe, gpus: int) -> str:
    """What does not fit a card of 80 GB, and what to do about it; empty where all fits."""
    if plan.memory <= CARD:
        return ""
    sizes = {name: value for name, value in plan._asdict().items() if name != "flops"}
    largest = max(sizes, key=sizes.get)
    advice = {
        "activations": "checkpointing full, or fewer tokens and patches",
        "working": "fewer tokens and patches in a pack",
    }.get(largest, "more GPUs, or a larger share of frozen weights")
    if largest == "activations" and recipe.checkpointing == "full":
        advice = "fewer tokens and patches in a pack"
    share = f"most are {largest}, {sizes[largest] / 1e9:.1f} GB on {gpus} GPUs"
    return f"{plan.memory / 1e9:.1f} GB do not fit {CARD / 1e9:.0f} GB: {share}; {advice}"


def _head_is_trained(recipe: Recipe) -> bool:
    return recipe.adapter == "full" or bool({"head", "new_tokens"} & set(recipe.trained))


def _linears(config: Idefics2Config, part: str) -> list[tuple[int, int, int]]:
    """The linear layers of a part, fused as the model fuses them: projections in one, width of the input, rows."""
    vision, text, perceiver = config.vision, config.text, config.perceiver
    if part == "vision":
        layer = [(3, vision.hidden_size, 3 * vision.hidden_size), (1, vision.hidden_size, vision.hidden_size)]
        layer += [(1, vision.hidden_size, vision.intermediate_size), (1, vision.intermediate_size, vision.hidden_size)]
        return layer * vision.num_hidden_layers
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    if part == "text":
        layer = [
            (3, text.hidden_size, queries + 2 * keys),
            (1, queries, text.hidden_size),
            *_gated(text.hidden_size, text.intermediate_size),
        ]
        return layer * text.num_hidden_layers
    queries, keys = perceiver.n_heads * perceiver.head_dim, perceiver.num_key_value_heads * perceiver.head_dim
    layer = [(1, text.hidden_size, queries), (2, text.hidden_size, 2 * keys), (1, queries, text.hidden_size)]
    layer += _gated(text.hidden_size, 4 * text.hidden_size)
    return [*_gated(vision.hidden_size, text.intermediate_size, text.hidden_size), *layer * perceiver.depth]


def _gated(width: int, inner: int, out: int | None = None) -> list[tuple[int, int, int]]:
    return [(2, width, 2 * inner), (1, inner, out or width)]


def _largest_group(config: Idefics2Config, recipe: Recipe) -> int:
    """Parameters of the largest group that is gathered at one time, its adapters among them."""
    parts = counters.count_parameters(config)
    layers = {"vision": config.vision.num_hidden_layers, "text": config.text.num_hidden_layers, "connector": 1}
    sizes = {"vision": parts.vision / layers["vision"], "text": (parts.text - parts.head) / layers["text"], "connector": parts.connector}
    if recipe.adapter != "full":
        for part in recipe.targets:
            adapters = sum(recipe.rank * (projections * width + out) for projections, width, out in _linears(config, part))
            sizes[part] += adapters / layers[part]
    return round(max(sizes.values()))


def _images(patches: int) -> list[int]:
    return [IMAGE_PATCHES] * (patches // IMAGE_PATCHES) + ([rest] if (rest := patches % IMAGE_PATCHES) else [])


def _activations(config: Idefics2Config, recipe: Recipe) -> tuple[float, float]:
    """Of one pack: what every layer keeps until its backward pass, and what the layer works with that is in it."""
    vision, text, perceiver = config.vision, config.text, config.perceiver
    trains = {"vision", "text", "connector"} if recipe.adapter == "full" else {*recipe.targets, *recipe.trained}
    queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    inside = _kept(recipe, "text", text.hidden_size, queries, 2 * queries + 3 * keys, text.intermediate_size, 3)
    values = recipe.tokens * text.num_hidden_layers * _between(recipe, text.hidden_size, queries, inside)
    working = recipe.tokens * _working(recipe, "text", inside, text.intermediate_size)
    if "vision" in trains:
        width = vision.hidden_size
        inside = _kept(recipe, "vision", width, width, 3 * width, vision.intermediate_size, 1)
        values += recipe.patches * (vision.patch_dim if recipe.adapter == "full" or "vision" in recipe.trained else 0)
        values += recipe.patches * vision.num_hidden_layers * _between(recipe, width, width, inside)
        working = max(working, recipe.patches * _working(recipe, "vision", inside, vision.intermediate_size))
    if trains & {"vision", "connector"}:
        kv = 2 * perceiver.depth * perceiver.num_key_value_heads * perceiver.head_dim
        values += recipe.patches * (vision.hidden_size + 4 * text.intermediate_size + text.hidden_size + 2 * kv)
        values += len(_images(recipe.patches)) * perceiver.n_latents * perceiver.depth * 20 * text.hidden_size
    return BYTES[recipe.dtype] * values, BYTES[recipe.dtype] * working


def _between(recipe: Recipe, width: int, attended: int, inside: int) -> int:
    """Values a row that a layer keeps until the backward pass comes to it, given those that it keeps whole."""
    return {"none": inside, "selective": width + attended, "full": width}[recipe.checkpointing]


def _working(recipe: Recipe, part: str, inside: int, inner: int) -> int:
    """Values a row of the layer that the backward pass is in: what it made anew, and the gradients around its activation function."""
    dropped = recipe.adapter != "full" and part in recipe.targets and recipe.dropout
    return (0 if recipe.checkpointing == "none" else inside) + inner * (5 if dropped else 3)


def _kept(recipe: Recipe, part: str, width: int, attended: int, projected: int, inner: int, inner_outputs: int) -> int:
    """Values a row that a whole layer keeps.

    Args:
        attended: width of attention's output; projected: of queries, keys and values, as projected and as rotated.
        inner_outputs: how many vectors of `inner` the activation function keeps.
    """
    adapted = recipe.adapter != "full" and part in recipe.targets
    whole = recipe.adapter == "full" or part in recipe.trained
    inputs = 2 * width + inner  # of the products; that of the output projection is attention's output
    kept = 2 * width + projected + attended + inner_outputs * inner
    kept += inputs if adapted or whole else 0
    kept += 2 * width if whole and part == "text" else 0  # RMSNorm keeps what its weight is multiplied with
    if adapted:
        kept += inputs + 2 * attended if recipe.dropout else 0  # the factors, and another copy of attention's output
        kept += 2 * width if recipe.adapter == "dora" else 0  # outputs that otherwise only the residual sees
        kept += 7 * recipe.rank
    return kept
