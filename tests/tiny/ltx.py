"""Tiny LTX-Video pipelines with random weights."""

from pathlib import Path
from typing import Any

import torch

# The first LTX-Video, and the later ones (13B included), as diffusers' script converts them.
VERSIONS: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "pipeline": "LTXImageToVideoPipeline",
        "vae": {
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
        "scheduler": {
            "use_dynamic_shifting": True,
            "base_shift": 0.95,
            "max_shift": 2.05,
            "base_image_seq_len": 1024,
            "max_image_seq_len": 4096,
            "shift_terminal": 0.1,
        },
    },
    "0.9.5": {
        "pipeline": "LTXConditionPipeline",
        "vae": {
            "block_out_channels": (8, 8, 8, 16, 16),
            "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, True, True),
            "decoder_spatio_temporal_scaling": (True, True, True),
            "decoder_inject_noise": (False, False, False, False),
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "upsample_residual": (True, True, True),
            "upsample_factor": (2, 2, 2),
            "timestep_conditioning": True,
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        "scheduler": {},
    },
}


def write(folder: Path, version: str, text: dict[str, Any], *, head: int = 8) -> Path:
    """Write a pipeline in the layout of the Hub, weights in shards, with a tokenizer of words."""
    import diffusers

    torch.manual_seed(0)
    settings = VERSIONS[version]
    # A scaling factor other than 1 shows on which side it counts.
    vae = diffusers.AutoencoderKLLTXVideo(
        **settings["vae"], latent_channels=4, patch_size=4, scaling_factor=0.7
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=head,
        cross_attention_dim=2 * head,
        num_layers=2,
        caption_channels=16,
    )
    # Queries and keys are large enough for attention to tell places apart.
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            torch.nn.init.constant_(parameter, 3.0)
    pipeline = getattr(diffusers, settings["pipeline"])(
        **text,
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**settings["scheduler"]),
    )
    pipeline.save_pretrained(folder, max_shard_size="20KB")
    return folder
