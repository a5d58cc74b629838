"""The demo's base model: a small causal transformer over bytes, and its weights as shipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

WEIGHTS = "base.safetensors"
VOCAB = 256


@dataclass(frozen=True)
class ByteLMConfig:
    """The shape of a `ByteLM`.

    Attributes:
        dim: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads; divides `dim`.
        hidden: inner width of the gated MLP.
        context: longest sequence in bytes.
    """

    dim: int = 160
    layers: int = 4
    heads: int = 5
    hidden: int = 432
    context: int = 256


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mixes positions.

        Args:
            x: [batch, seq, dim]
            cos: [seq, head_dim]
            sin: [seq, head_dim]

        Returns:
            [batch, seq, dim]
        """
        q = rotate(self._split(self.q_proj(x)), cos, sin)
        k = rotate(self._split(self.k_proj(x)), cos, sin)
        v = self._split(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _split(self, x: Tensor) -> Tensor:
        """[batch, seq, dim] -> [batch, heads, seq, head_dim]."""
        batch, seq, _ = x.shape
        return x.view(batch, seq, self.heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """The SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.up_proj = nn.Linear(config.dim, config.hidden, bias=False)
        self.down_proj = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, dim] -> [batch, seq, dim]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ByteLMConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, seq, dim] -> [batch, seq, dim]."""
        x = x + self.attn(self.attn_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ByteLM(nn.Module):
    """A byte-level causal language model: pre-norm RMSNorm, RoPE (arXiv 2104.09864), SwiGLU.

    Bytes are the tokens, so any file is a text and no tokenizer is involved.

    Examples:
        >>> model = load_base()
        >>> model(torch.tensor([list(b"import ")])).shape
        torch.Size([1, 7, 256])
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ByteLMConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ByteLMConfig()
        self.embed = nn.Embedding(VOCAB, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        # Not tied to the embedding: it is 3 % of the weights, and each parameter has one name and one use.
        self.lm_head = nn.Linear(config.dim, VOCAB, bias=False)
        cos, sin = rotary_table(config.context, config.dim // config.heads)
        # Derived from the config, so they belong neither in the state dict nor in the file.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores every next byte.

        Args:
            ids: [batch, seq] int64 in 0..255, with seq <= config.context

        Returns:
            Logits, [batch, seq, 256].
        """
        seq = ids.shape[1]
        if seq > self.config.context:
            raise ValueError(f"ids: expected at most {self.config.context} bytes a row, got {seq}")
        x = self.embed(ids)
        for block in self.layers:
            x = block(x, self.cos[:seq], self.sin[:seq])
        logits: Tensor = self.lm_head(self.norm(x))
        return logits

    @torch.no_grad()
    def generate(
        self, prompt: bytes, n: int = 200, temperature: float = 0.7, generator: torch.Generator | None = None
    ) -> bytes:
        """Continues a text, one byte at a time.

        Args:
            prompt: at least one byte; the model sees the last `config.context` bytes of the text so far.
            n: how many bytes to add.
            temperature: divides the logits; 0 takes the likeliest byte.
            generator: source of the samples; torch's default generator if None.

        Returns:
            The prompt followed by `n` bytes.

        Raises:
            ValueError: the prompt is empty.
        """
        if not prompt:
            raise ValueError("prompt: expected at least one byte to continue, got none")
        ids = torch.tensor([list(prompt)], device=self.cos.device)
        for _ in range(n):
            logits = self(ids[:, -self.config.context :])[:, -1]
            if temperature > 0:
                probabilities = torch.softmax(logits / temperature, dim=-1)
                following = torch.multinomial(probabilities, 1, generator=generator)
            else:
                following = logits.argmax(dim=-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
        return bytes(ids[0].tolist())


def rotary_table(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [context, head_dim]."""
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(context), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + head_dim/2]) by its position's angle.

    Args:
        x: [batch, heads, seq, head_dim]
        cos: [seq, head_dim]
        sin: [seq, head_dim]

    Returns:
        [batch, heads, seq, head_dim]
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def next_byte_loss(model: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of predicting each byte from those before it.

    Args:
        model: [batch, seq] ids -> [batch, seq, 256] logits; a `ByteLM` or anything that is called like one.
        windows: [batch, context + 1] int64

    Returns:
        A scalar.
    """
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def load_weights(file: str) -> ByteLM:
    """Reads a model that `examples/train_base.py` wrote: float32, in eval mode, frozen.

    Args:
        file: path of a safetensors file with the config as JSON under the metadata key "config".

    Returns:
        The model.
    """
    with safe_open(file, framework="pt") as stored:
        config = ByteLMConfig(**json.loads(stored.metadata()["config"]))
        state = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118
    model = ByteLM(config)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def load_base() -> ByteLM:
    """Loads the base model that ships with the package: float32, in eval mode, frozen."""
    with resources.as_file(resources.files("funclora.demo") / WEIGHTS) as file:
        return load_weights(str(file))
