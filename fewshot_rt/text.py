"""The text encoder of a folder in diffusers' layout: loaded for one prompt, and let go.

Axes: L tokens, D width.
"""

from pathlib import Path

import torch
from torch import Tensor

from .device import enough_memory, weight_type
from .errors import ModelError


def encode_text(
    folder: Path, prompt: str, *, length: int, is_masked: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Embed a prompt with the folder's T5 or UMT5; give its mask, too: 1 for words, 0 for padding.

    is_masked: whether padding is hidden from the encoder, as the pipelines of Wan and of LTX-Video
    from 0.9.5 on have it; those of CogVideoX and of LTX-Video before let the encoder see it.
    device: where the encoder runs; in bf16 on cuda, in fp32 else.
    Shapes: embeddings [1, L, D], mask [1, L], L = `length`; both float32, on the CPU.
    Raises: ModelError if a file of the encoder is missing or damaged.
    """
    from transformers import AutoModelForTextEncoding, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        encoder = AutoModelForTextEncoding.from_pretrained(
            folder / "text_encoder", dtype=weight_type(device)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the text encoder in {folder} cannot be read ({error}). Download all of its files "
            "again."
        ) from error
    tokens = tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(device)
    mask = tokens.attention_mask
    with enough_memory(), torch.no_grad():
        embedded = encoder.to(device)(tokens.input_ids, attention_mask=mask if is_masked else None)[
            0
        ]
    return embedded.float().cpu(), mask.float().cpu()
