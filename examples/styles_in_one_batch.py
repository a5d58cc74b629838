"""One batch of images, each drawn in a style of its own: every row of the denoiser's batch has its own adapter.

    python examples/styles_in_one_batch.py
    python examples/styles_in_one_batch.py --model transformer --images 6 --steps 8

The models are small and random, so the pictures are noise; what counts is that each image of the batch equals the
image that the pipeline draws alone with the same style. The styles are files as diffusers writes them.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import funclora as fl
from funclora.io import load_diffusers, save_diffusers

WORDS, WIDTH = 6, 16  # of a prompt
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "time_emb_proj"],
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.2"],
}


class Result(NamedTuple):
    difference: float  # between an image of the batch and the same image alone, the largest of all values
    effect: float  # of the styles: the least that one of them changes its image
    calls: int  # of the denoiser, for all images together


def denoiser(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "unet":
        return UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()  # fmt: skip
    return SD3Transformer2DModel(
        sample_size=16, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=16,
    ).eval()  # fmt: skip


def make_styles(model: nn.Module, name: str, folder: Path, styles: int) -> None:
    """Files as a trainer leaves them, with ranks of their own."""
    for i in range(styles):
        config = fl.LoraConfig(r=2 + 2 * i, lora_alpha=8, target_modules=TARGETS[name], init_lora_weights=False)
        made = fl.init(model, config, generator=torch.Generator().manual_seed(i))
        save_diffusers(folder, {name: (made, config)}, name=f"style-{i}.safetensors")


# --8<-- [start:draw]
def draw(model: nn.Module, name: str, prompts: Tensor, noise: Tensor, steps: int, guidance: float = 4.0) -> Tensor:
    """The usual loop, with classifier-free guidance: the batch is every image without and with its prompt."""
    empty = torch.zeros_like(prompts)
    if name == "unet":
        scheduler: Any = EulerDiscreteScheduler(steps_offset=1)
        words: dict[str, Tensor] = {}
    else:
        scheduler = FlowMatchEulerDiscreteScheduler()
        words = {"pooled_projections": torch.cat([empty, prompts]).mean(1)}
    scheduler.set_timesteps(steps)
    images = noise * scheduler.init_noise_sigma if name == "unet" else noise
    for t in scheduler.timesteps:
        both = torch.cat([images, images])
        both = scheduler.scale_model_input(both, t) if name == "unet" else both
        times = t.expand(len(both))  # one for each row, so that adapted layers of the time know whose row it is
        said = model(both, timestep=times, encoder_hidden_states=torch.cat([empty, prompts]), **words).sample
        plain, prompted = said.chunk(2)
        images = scheduler.step(plain + guidance * (prompted - plain), t, images).prev_sample
    return images


def draw_in_styles(
    model: nn.Module, name: str, styles: list[dict[str, fl.Rule]], ids: list[int], prompts: Tensor, noise: Tensor,
    steps: int,
) -> Tensor:  # fmt: skip
    """Image i in style `ids[i]`; -1 is no style."""
    adapters = fl.route(fl.stack(styles), ids + ids)  # the rows of the batch: without prompts, then with them
    return draw(fl.bind(model, fl.base_params(model), adapters), name, prompts, noise, steps)
    # --8<-- [end:draw]


@torch.no_grad()
def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TARGETS), default="unet")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--styles", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args(argv)
    name, model = options.model, denoiser(options.model)
    with tempfile.TemporaryDirectory() as folder:
        make_styles(model, name, Path(folder), options.styles)
        files = sorted(Path(folder).iterdir())
        styles = [load_diffusers(file, {name: model})[name][0] for file in files]
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randn(options.images, WORDS, WIDTH, generator=generator)
    noise = torch.randn(options.images, 4, 16, 16, generator=generator)
    ids = [i % (options.styles + 1) - 1 for i in range(options.images)]
    together = draw_in_styles(model, name, styles, ids, prompts, noise, options.steps)
    params, differences, effects = fl.base_params(model), [], []
    for i, style in enumerate(ids):
        mine = prompts[i : i + 1], noise[i : i + 1]
        alone = draw(fl.bind(model, params, styles[style] if style >= 0 else {}), name, *mine, options.steps)
        change = (together[i : i + 1] - draw(model, name, *mine, options.steps)).abs().max().item()
        differences.append((together[i : i + 1] - alone).abs().max().item() / alone.abs().max().item())
        effects += [change] if style >= 0 else []
        label = f"style {style}" if style >= 0 else "no style"
        print(f"image {i}, {label}: differs from itself alone by {differences[-1]:.1e}, from no style by {change:.2f}")
    print(f"{options.images} images in {len(set(ids))} styles: {options.steps} calls of the denoiser")
    return Result(max(differences), min(effects), options.steps)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' schedulers about their own defaults
        main()
