"""transformers' encoders behind one signature: ids and mask in, token and pooled embeddings out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertModel, CLIPTextConfig, CLIPTextModel, T5EncoderModel
from transformers.configuration_utils import PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from gentron.config import TextConfig
from gentron.contract import MASKED
from gentron.errors import BundleError

ATTENTION = "matmul_softmax_float32"


def _attention(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_bias: Tensor | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    """transformers' eager attention with a float32 softmax, in the form that compilers fuse.

    Its sdpa form adds IsNaN nodes to the graph, or does not trace at all (T5).
    """
    scores = ((query * scaling) @ key.transpose(2, 3)).float()
    for bias in (position_bias, attention_mask):
        if bias is not None:
            scores = scores + bias
    out = scores.softmax(-1).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask as an additive float32 one, with our fill: its own is the lowest
    number of the compute type, which leaves float16 no room."""
    kwargs |= {"allow_is_causal_skip": False}
    seen: Tensor | None = sdpa_mask(*args, **kwargs)
    return None if seen is None else seen.logical_not().float() * MASKED


AttentionMaskInterface.register(ATTENTION, _mask)


def encoder_config(values: dict[str, Any]) -> PretrainedConfig:
    """A transformers configuration from its JSON."""
    given = dict(values)
    kind = given.pop("model_type")
    if kind == "clip_text_model":
        return CLIPTextConfig(**given)
    return AutoConfig.for_model(kind, **given)


class TextEncoder(nn.Module):
    """A CLIP text model, a T5 encoder or a BERT, in the type of torch's default dtype."""

    def __init__(self, text: TextConfig, config: PretrainedConfig):
        super().__init__()
        self.text = text
        config._attn_implementation = ATTENTION
        if text.family == "clip":
            self.model: nn.Module = CLIPTextModel(config)
        elif text.family == "t5":
            self.model = T5EncoderModel(config)
        elif text.family == "bert":
            self.model = BertModel(config, add_pooling_layer=False)
        else:
            raise BundleError(f"text encoder family {text.family!r} is not one of clip, t5, bert")
        self.eos_token_id = getattr(config, "eos_token_id", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """Ids and mask, [U, L] int64 -> hidden [U, L, W] and, where there is one, pooled [U, W];
        float32."""
        # Positions are explicit, because a buffer has no values while tracing without weights.
        positions = torch.arange(input_ids.shape[1])[None]
        if self.text.family == "clip":
            # Padding comes after the end token, so the causal mask alone hides it from the rest.
            output = self.model(input_ids=input_ids, position_ids=positions)
        elif self.text.family == "bert":
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                token_type_ids=torch.zeros_like(input_ids),
            )
        else:
            # Embeddings enter in float32, so the residual stream is float32 from its start.
            embedded = self.model.get_input_embeddings()(input_ids).float()
            output = self.model(inputs_embeds=embedded, attention_mask=attention_mask)
        hidden = output.last_hidden_state.float()
        if not self.text.gives_pooled:
            return (hidden,)
        if self.text.family == "clip":
            return hidden, self._at_end_token(hidden, input_ids)
        weight = attention_mask.to(hidden.dtype)[..., None]
        return hidden, (hidden * weight).sum(1) / weight.sum(1)

    def _at_end_token(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """CLIP's pooled state: the final hidden state at the first end token, unprojected."""
        if self.eos_token_id == 2:  # configurations from before the end token was recorded
            place = input_ids.argmax(dim=-1)
        else:
            place = (input_ids == self.eos_token_id).to(torch.int32).argmax(dim=-1)
        index = place[:, None, None].expand(-1, 1, hidden.shape[-1])
        return hidden.gather(1, index)[:, 0]
