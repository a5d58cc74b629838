"""Adapter files of other trainers: diffusers, kohya's scripts, mlx-lm."""
