"""What a training step keeps in the memory of one rank, in closed form.

Parameters, gradients and optimizer state are counted from the shape and the mesh
(plan_parameters.py); activations are what autograd saves in the code of model/, tensor by tensor;
both are held against the real thing by tests. A step has a few moments at which memory may be
highest, see `moments`; the peak is the highest of them. What the formulas take for granted of a run
on several ranks:

    fsdp   every rank keeps 1 / (dp_shard x cp) of its parameters in fp32, as well as of gradients
           and moments; copies in the compute dtype of two layers (the next is fetched ahead) and
           of the root unit (embedding, final norm, head) are gathered; gradients are reduced in
           fp32, after each micro-batch; gloo, on the CPU, has a copy of what it sums
    tp     matrices, heads and the vocabulary are divided, and tokens between them (sequence
           parallel, Korthikanti et al. 2022); the gathered inputs of products are kept; a mixture
           is whole on each rank, which applies it to its own tokens
    cp     by heads (Ulysses, Jacobs et al. 2023)
    ep     a rank gathers its own experts alone; routers send every expert as much
    pp     1F1B (Narayanan et al. 2021): stage s holds the activations of pp - s micro-batches

A run on one rank keeps what precision.py says. Allocators and libraries take memory of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwen2.model.config import BYTES, Mixture, ModelConfig
from qwen2.train.checkpoints import FILE_BYTES
from qwen2.train.loss import BLOCK_BYTES, CHUNK_BYTES
from qwen2.train.mesh import Mesh
from qwen2.train.plan_parameters import (
    root_parameters,
    share,
    stage_layers,
    stage_parameters,
    stage_shares,
)
from qwen2.train.recompute import Recompute

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""See recompute.py; from what needs most memory."""


@dataclass(frozen=True)
class Work:
    """A step of one run: the model, how ranks share it, and the rows of a micro-batch."""

    model: ModelConfig
    mesh: Mesh  # resolved
    context: int  # tokens of a row
    rows: int  # of a micro-batch, which the ranks of cp and tp share
    micro_batches: int  # of a step, on each rank of dp
    dtype: Literal["bf16", "fp32"] = "bf16"
    recompute: Recompute = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"
    on_cpu: bool = False
    """Where the RMS norm is no kernel of its own, which keeps its input and output in fp32."""
    async_checkpoints: bool = False
    """Written from a copy in the host's memory, which is the CPU's own."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that a rank of cp has, before tp divides them."""
        return self.rows * self.context // self.mesh.cp


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at one moment."""

    weights: int = 0  # that stay: fp32, and on one rank the bf16 model beside it
    gathered: int = 0  # copies in the compute dtype of what FSDP has together
    gradients: int = 0  # in fp32, and of what is not reduced yet in the compute dtype
    optimizer: int = 0  # moments in fp32: AdamW's two, or Muon's one of hidden matrices
    activations: int = 0  # that are saved for the backward pass
    loss: int = 0  # the logits' block, and the gradients that come from it
    working: int = 0  # what a layer's backward pass makes, or computes again
    buffers: int = 0  # of collectives
    checkpoint: int = 0  # that is being written: a copy of weights and moments, and a file of it

    @property
    def total(self) -> int:
        """All together."""
        return (
            self.weights + self.gathered + self.gradients + self.optimizer
            + self.activations + self.loss + self.working + self.buffers + self.checkpoint
        )  # fmt: skip


def stages_that_differ(work: Work) -> list[int]:
    """The first, the second, the first with fewer layers, the last: others are like one of them,
    but hold fewer micro-batches."""
    pp = work.mesh.pp
    fewer = work.model.num_hidden_layers % pp
    return sorted({0, min(1, pp - 1), min(fewer, pp - 1), pp - 1})


def layer_activations(work: Work, recompute: Recompute | None = None) -> int:
    """Bytes that one layer saves for the backward pass of a micro-batch, on one rank.

    `recompute` instead of the work's own.
    """
    model, b, tp, n = work.model, work.itemsize, work.mesh.tp, work.tokens
    kept = recompute or work.recompute
    stream = model.hidden_size * b
    if kept == "full":
        return share(n * stream, tp)  # the layer's input
    if kept == "selective":
        # The layer's input, q, k, v, attention's output and lse, and what o_proj returns.
        attention = 4 * stream + 2 * model.kv_size * b + 4 * model.num_attention_heads
        if model.moe is None:  # gate, up and down
            return share(n * (attention + stream + 2 * model.intermediate_size * b), tp)
        # The router's logits; of the shared expert gate, up and down, and its own gate. The
        # routed experts are computed again.
        width = model.moe.shared_expert_intermediate_size
        shared = stream + (2 * width + 1) * b if width else 0
        return share(n * (attention + shared + 4 * model.moe.num_experts), tp)
    # q, attention's output and o_proj's input; lse; k and v as ranks of cp have them.
    heads = max(model.num_key_value_heads, tp * work.mesh.cp)
    attention = 3 * stream + 4 * model.num_attention_heads + 2 * heads * model.head_dim * b
    divided = 2 * _norm(work) + attention
    gathered = n * stream  # the input of q, k, v
    if model.moe is None:
        # gate, silu(gate), up and the input of down; the input of gate and up is gathered too
        return share(n * (divided + 4 * model.intermediate_size * b), tp) + 2 * gathered
    mixture, constant = _mixture(work, model.moe)
    return share(n * (divided + stream + mixture), tp) + gathered + constant


def _norm(work: Work) -> int:
    """Bytes a token: the input, and 1 / rms; on the CPU input and quotient, both in fp32."""
    C = work.model.hidden_size
    return 8 * C + 4 if work.on_cpu else C * work.itemsize + 4


def _mixture(work: Work, moe: Mixture) -> tuple[int, int]:
    """Bytes that a mixture saves, beside its input: of a token, and others.

    Each rank of tp applies it to tokens of its own.
    """
    b, C = work.itemsize, work.model.hidden_size
    E, k, width = moe.num_experts, moe.num_experts_per_tok, moe.shared_expert_intermediate_size
    # Experts compute silu again, the shared expert's is kept as an MLP's.
    each = 2 * k * moe.moe_intermediate_size * b + 4 * width * b
    # Logits, probabilities, logsumexp; ids, order and its reverse; weights.
    each += 8 * E + 4 + 24 * k + k * b
    each += 4 * k + 4 if moe.norm_topk_prob else 0
    each += (C + 1) * b if width else 0  # the shared expert's output and its gate
    each += 2 * k * C * b if work.mesh.ep > 1 else 0  # rows sent to experts, and back
    constant = 8 * E
    if b < 4:  # the router's input and weight in fp32
        each += 4 * C
        constant += 4 * C * E
    return each, constant


def activations(work: Work, stage: int = 0, recompute: Recompute | None = None) -> int:
    """Bytes that a stage saves for the backward passes it has open, on one rank."""
    model, mesh, b = work.model, work.mesh, work.itemsize
    layers = stage_layers(model.num_hidden_layers, mesh.pp)[stage]
    n = work.tokens
    each = layers * layer_activations(work, recompute)
    each += n * model.head_dim * b * mesh.cp  # cos and sin of the rotations: of whole rows
    if stage == 0:
        each += 8 * n  # ids, for the embedding
    if stage == mesh.pp - 1:
        each += share(n * _norm(work), mesh.tp)
    return each * min(mesh.pp - stage, work.micro_batches)


def loss_block(work: Work) -> tuple[int, int]:
    """Bytes of the logits' block of `chunked_cross_entropy` on one rank, and how many blocks."""
    row = share(work.model.vocab_size, work.mesh.tp) * work.itemsize
    blocks = math.ceil(work.tokens * row / BLOCK_BYTES)
    return math.ceil(work.tokens / blocks) * row, blocks


def _loss(work: Work) -> tuple[int, int]:
    """Bytes of the loss while its forward pass runs, and while its backward pass does."""
    b, hidden = work.itemsize, work.tokens * work.model.hidden_size * work.itemsize
    head = share(work.model.vocab_size, work.mesh.tp) * work.model.hidden_size
    logits, blocks = loss_block(work)
    # Of several blocks, the weight's gradients add up in fp32.
    sums = 0 if blocks == 1 else 4 * head
    forward = logits + 2 * hidden + sums + max(min(2 * CHUNK_BYTES, 2 * logits), b * head)
    return forward, 2 * hidden + 2 * head * b


def _working(work: Work) -> int:
    """Bytes that the backward pass of a layer makes beside what was saved: gradients of the
    feed-forward's inner tensors and of the residual stream, and all that is computed again."""
    model, b, tp = work.model, work.itemsize, work.mesh.tp
    width = model.intermediate_size
    if moe := model.moe:
        # inner, its gradient, silu, slope and the two gradients of the product before silu
        width = 2 * moe.num_experts_per_tok * moe.moe_intermediate_size
    made = work.tokens * (share(3 * width, tp) + 2 * model.hidden_size) * b
    return made + (0 if work.recompute == "none" else layer_activations(work, "none"))


def moments(work: Work, stage: int = 0) -> Iterator[Memory]:
    """The moments of a step at which a rank's memory may be highest: loss, the beginning of the
    backward pass, its end, and the update; of several ranks also what lies between."""
    if work.mesh.world_size == 1:
        return _moments_alone(work)
    return _moments_shared(work, stage)


def peak(work: Work, stage: int = 0) -> Memory:
    """The moment at which a rank of `stage` needs most."""
    return max(moments(work, stage), key=lambda moment: moment.total)


def _optimizer(work: Work, stage: int) -> int:
    """Bytes of the optimizer's state."""
    shares = stage_shares(work.model, work.mesh, stage)
    return 8 * shares.kept - (4 * shares.hidden if work.optimizer == "muon" else 0)


def _checkpoint(work: Work, stage: int) -> int:
    """Bytes of an asynchronous checkpoint: copies of the fp32 weights and of the optimizer's state,
    which stay from the first one on, and of the file that is being written (checkpoints.py)."""
    if not (work.on_cpu and work.async_checkpoints):
        return 0
    state = _optimizer(work, stage)
    weights = stage_parameters(work.model, work.mesh, stage).counts
    largest = 4 * max(weight.kept(work.mesh) for weight, _ in weights)
    file = min(max(FILE_BYTES, largest), state)
    return 4 * stage_shares(work.model, work.mesh, stage).kept + state + file


def _moments_alone(work: Work) -> Iterator[Memory]:
    """Of one process, see `train_step` and precision.py."""
    model, b = work.model, work.itemsize
    parameters = model.num_parameters()
    weights = parameters * (4 if b == 4 else 4 + b)
    state = {
        "weights": weights, "optimizer": _optimizer(work, 0), "checkpoint": _checkpoint(work, 0),
    }  # fmt: skip
    before = 4 * parameters if work.micro_batches > 1 else 0  # of earlier micro-batches
    saved = activations(work)
    forward, backward = _loss(work)
    yield Memory(**state, gradients=before, activations=saved, loss=forward)
    yield Memory(
        **state, gradients=before, activations=saved, loss=backward, working=_working(work)
    )
    # The model's own gradients; in fp32 they are the masters', and add up in place. A tied
    # embedding's share meets the head's.
    own = b * parameters if b < 4 or not before else 0
    tied = b * root_parameters(model, last=False).total if model.tie_word_embeddings else 0
    layer = layer_activations(work, "none")
    yield Memory(**state, gradients=before + own + tied, activations=layer, working=_working(work))
    yield Memory(**state, gradients=4 * parameters)


def _sent(work: Work, stage: int) -> int:
    """Bytes for what the stages beside this one send: torch has room for all micro-batches of a
    step, see pipeline_parallel.py."""
    beside = (stage > 0) + (stage < work.mesh.pp - 1)
    hidden = share(work.tokens * work.model.hidden_size * work.itemsize, work.mesh.tp)
    return beside * work.micro_batches * hidden


def _moments_shared(work: Work, stage: int) -> Iterator[Memory]:
    """Of a rank among several: FSDP over the mesh's dp_shard and cp.

    Its units are the root, which stays gathered until the backward pass ends, and of each layer the
    routed experts and the rest. The last layer's gather is held until the loss is there; then the
    same is fetched again, and going back always the rest of the next layer. What the last unit was
    reduced from stays until the next is.
    """
    model, mesh, b = work.model, work.mesh, work.itemsize
    layers = stage_layers(model.num_hidden_layers, mesh.pp)[stage]
    shares = stage_shares(model, mesh, stage)
    layer, root, experts = shares.layer, shares.root, shares.experts // layers
    rest = layer - experts
    ahead = rest if mesh.fsdp > 1 else 0  # one rank copies its weights when they are used
    reduced = 4 * max(rest, experts)
    state = {
        "weights": 4 * shares.kept, "optimizer": _optimizer(work, stage),
        "checkpoint": _checkpoint(work, stage),
    }  # fmt: skip
    more = work.micro_batches > 1  # whose gradients are there already
    saved, sent = activations(work, stage), _sent(work, stage)
    others = saved - saved // min(mesh.pp - stage, work.micro_batches)
    forward, backward, head = 0, 0, 0
    if stage == mesh.pp - 1:
        forward, backward = _loss(work)
        head = b * share(model.vocab_size, mesh.tp) * model.hidden_size  # its gradient waits
    for loss in (forward, backward):
        yield Memory(
            **state, gathered=b * root, gradients=4 * shares.kept * more, activations=saved,
            loss=loss, buffers=b * ahead + sent,
        )  # fmt: skip
    for done in sorted({0, min(1, layers - 1), layers - 1}):
        # Of layers that are done gradients are there, and activations are gone.
        own = shares.kept if more else done * shares.kept_layer
        yield Memory(
            **state,
            gathered=b * (root + layer + (ahead if done < layers - 1 else 0)),
            gradients=4 * own + head + b * layer,
            activations=max(saved - done * layer_activations(work), others),
            working=_working(work),
            buffers=(reduced if done else 0) + sent,
        )
    tied = head if model.tie_word_embeddings else 0  # meets the embedding's
    own = shares.kept if more else layers * shares.kept_layer
    yield Memory(
        **state, gathered=b * root, gradients=4 * own + b * root + tied, activations=others,
        buffers=reduced + sent,
    )  # fmt: skip
    # Gradients are copied in fp32, and their sums beside them. gloo sums in a copy of its own, and
    # one rank alone divides into one. FSDP's loop over them holds the last meanwhile: the head's.
    copies = 8 * root if work.on_cpu or mesh.fsdp == 1 else (4 + b) * root
    if work.on_cpu and mesh.fsdp > 1:
        copies += head - tied
    own = shares.kept + (shares.kept - layers * shares.kept_layer) * more
    yield Memory(**state, gradients=4 * own, activations=others, buffers=copies + sent)
    yield Memory(**state, gradients=4 * shares.kept)
