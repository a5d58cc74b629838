"""A population of LoRA adapters in JAX, for benchmark_many.py: `jit(vmap(grad))` and optax's AdamW.

The same Llama with the same weights, written in JAX's own way. Nothing here is needed by funclora.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from torch import Tensor

Tree = Any


def array(x: Tensor) -> jax.Array:
    return jnp.asarray(x.detach().cpu().numpy())


def llama(config: Any, inv_freq: jax.Array, weights: Mapping[str, jax.Array], lora: Tree, ids: jax.Array) -> jax.Array:
    """Logits `[rows, tokens, vocabulary]`. `lora`: name of a weight -> (A, B), scaled."""
    rows, tokens = ids.shape
    heads = config.num_attention_heads
    angles = jnp.arange(tokens)[:, None] * inv_freq
    cos, sin = (jnp.concatenate([f(angles)] * 2, -1) for f in (jnp.cos, jnp.sin))
    causal = jnp.tril(jnp.ones((tokens, tokens), bool))

    def linear(x: jax.Array, name: str) -> jax.Array:
        y = x @ weights[f"{name}.weight"].T
        if f"{name}.weight" in lora:
            a, b = lora[f"{name}.weight"]
            y = y + (x @ a.T) @ b.T
        return y

    def norm(x: jax.Array, name: str) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + config.rms_norm_eps)
        return weights[f"{name}.weight"] * (x * scale)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows, tokens, heads, -1).transpose(0, 2, 1, 3)

    def turned(x: jax.Array) -> jax.Array:
        one, other = jnp.split(x, 2, -1)
        return x * cos + jnp.concatenate([-other, one], -1) * sin

    h = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        x = norm(h, f"{at}.input_layernorm")
        q, k, v = (split(linear(x, f"{at}.self_attn.{name}_proj")) for name in "qkv")
        q, k = turned(q), turned(k)
        scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
        mixed = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1) @ v
        h = h + linear(mixed.transpose(0, 2, 1, 3).reshape(rows, tokens, -1), f"{at}.self_attn.o_proj")
        x = norm(h, f"{at}.post_attention_layernorm")
        gate, up = (linear(x, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        h = h + linear(jax.nn.silu(gate) * up, f"{at}.mlp.down_proj")
    return linear(norm(h, "model.norm"), "lm_head")


def population(model: Any, members: Sequence[Mapping[str, Any]], x: Tensor, y: Tensor, lr: float) -> Callable[[], Any]:
    """A training step of all members on rows of their own; each call takes one, and returns the losses.

    Args:
        model: a LlamaForCausalLM of transformers in float32, without grouped heads.
        members: LoRA rules by the name of their weight, of one rank.
        x: ids `[members, rows, tokens]`.
        y: the tokens to predict, alike.
        lr: the learning rate.
    """
    weights = {name: array(weight) for name, weight in model.named_parameters(remove_duplicate=False)}
    forward = functools.partial(llama, model.config, array(model.model.rotary_emb.inv_freq), weights)

    def loss(lora: Tree, ids: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(lora, ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer = optax.adamw(lr, weight_decay=0.0)

    @jax.jit
    def step(lora: Tree, state: Tree, ids: jax.Array, labels: jax.Array) -> tuple[Tree, Tree, jax.Array]:
        losses, grads = jax.vmap(jax.value_and_grad(loss))(lora, ids, labels)
        updates, state = jax.vmap(optimizer.update)(grads, state, lora)
        return optax.apply_updates(lora, updates), state, losses

    stacked = {
        name: tuple(
            jnp.stack([array(getattr(member[name], leaf) * factor) for member in members])
            for leaf, factor in (("a", 1.0), ("b", rule.scaling))
        )
        for name, rule in members[0].items()
    }
    batch = array(x), array(y)
    now = [stacked, jax.vmap(optimizer.init)(stacked)]

    def run() -> Any:
        *now[:], losses = step(*now, *batch)
        return jax.block_until_ready(losses)

    return run
