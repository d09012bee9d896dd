"""An LSTM language model as a Hugging Face model class.

This file is self-contained on purpose: `save_pretrained` copies it beside the weights, so that somebody without
this package loads the folder with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
With this package imported, plain `from_pretrained` finds the class in the registry.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class LstmConfig(PreTrainedConfig):
    """Shape of the model. `max_position_embeddings` is only the training length: an LSTM has no positions."""

    model_type = "rlhf_ray_lstm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 1000
    hidden_size: int = 128
    num_hidden_layers: int = 2
    max_position_embeddings: int = 1024
    initializer_range: float = 0.5
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


class LstmState(Cache):
    """Recurrent state in the place of a key-value cache: constant size, whatever the length.

    `hidden_LBH` and `cell_LBH` are None before the first token.
    """

    def __init__(self, hidden_LBH: Tensor | None = None, cell_LBH: Tensor | None = None, length: int = 0):
        super().__init__(layers=[])
        self.hidden_LBH, self.cell_LBH, self.length = hidden_LBH, cell_LBH, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.hidden_LBH is not None

    def reset(self) -> None:
        self.hidden_LBH, self.cell_LBH, self.length = None, None, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.hidden_LBH is not None:
            self.hidden_LBH = self.hidden_LBH[:, indices]
            self.cell_LBH = self.cell_LBH[:, indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.hidden_LBH is not None:
            self.hidden_LBH = self.hidden_LBH.repeat_interleave(repeats, dim=1)
            self.cell_LBH = self.cell_LBH.repeat_interleave(repeats, dim=1)

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("an LSTM state cannot be rolled back; do not use assisted generation with it")


class LstmPreTrainedModel(PreTrainedModel):
    config_class = LstmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _is_stateful = True  # refuses generation modes that would roll the cache back
    _supports_sdpa = True  # nothing here attends, so every attention setting is as good as another
    _supports_flash_attn = True
    _no_split_modules = ["LSTM"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scale = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.uniform_(module.weight, -scale, scale)
        elif isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    nn.init.uniform_(parameter, -1 / module.hidden_size**0.5, 1 / module.hidden_size**0.5)
                else:
                    nn.init.zeros_(parameter)
                    if name.startswith("bias_ih"):
                        # Forget gate open at the start (Jozefowicz et al., 2015): gates lie in order i, f, g, o.
                        parameter[module.hidden_size : 2 * module.hidden_size] = 1.0

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        raise ValueError(
            "LstmForCausalLM: gradient checkpointing is not supported, because a fused LSTM keeps its own activations; "
            "set gradient_checkpointing to false (they grow only linearly with the length)"
        )


class LstmModel(LstmPreTrainedModel):
    """Embedding and LSTM layers, without the language-model head."""

    def __init__(self, config: LstmConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LstmState | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """`last_hidden_state` [B, T, H], zero at padding; `past_key_values` is the state after the last token."""
        embeds_BTH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        rows, length = embeds_BTH.shape[:2]
        before = past_key_values if past_key_values is not None else LstmState()
        if before.is_initialized:
            start = (before.hidden_LBH, before.cell_LBH)
        else:
            zeros_LBH = embeds_BTH.new_zeros(self.config.num_hidden_layers, rows, self.config.hidden_size)
            start = (zeros_LBH, zeros_LBH)
        # During generation the mask covers the past as well; the state already holds it.
        mask_BT = None if attention_mask is None else attention_mask[:, -length:].bool()
        if mask_BT is None or bool(mask_BT.all()):
            features_BTH, (hidden_LBH, cell_LBH) = self.lstm(embeds_BTH, start)
        else:
            features_BTH, (hidden_LBH, cell_LBH) = self._skip_padding(embeds_BTH, mask_BT, start)
        state = LstmState(hidden_LBH, cell_LBH, before.length + length)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return BaseModelOutputWithPast(features_BTH, past_key_values=state if use_cache else None)

    def _skip_padding(
        self, embeds_BTH: Tensor, mask_BT: Tensor, start: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run each row over its real tokens alone, wherever they stand; padded positions get zeros."""
        # A stable sort of the mask moves a row's real tokens to the front in their order.
        order_BT = torch.argsort((~mask_BT).to(torch.int8), dim=1, stable=True)
        where_BTH = order_BT[..., None].expand_as(embeds_BTH)
        lengths_B = mask_BT.sum(dim=1)
        packed = pack_padded_sequence(
            embeds_BTH.gather(1, where_BTH),
            lengths_B.clamp(min=1).cpu(),  # packing refuses empty rows; they are put right below
            batch_first=True,
            enforce_sorted=False,
        )
        packed, (hidden_LBH, cell_LBH) = self.lstm(packed, start)
        front_BTH, _ = pad_packed_sequence(packed, batch_first=True, total_length=mask_BT.shape[1])
        features_BTH = torch.zeros_like(front_BTH).scatter(1, where_BTH, front_BTH) * mask_BT[..., None]
        empty_1B1 = (lengths_B == 0)[None, :, None]
        return features_BTH, (
            torch.where(empty_1B1, start[0], hidden_LBH),
            torch.where(empty_1B1, start[1], cell_LBH),
        )


class LstmForCausalLM(LstmPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LstmConfig):
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate then starts without a cache, and `forward` makes the state

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LstmState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, V]. `attention_mask` may pad left or right: the padding does not touch the state."""
        inner = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        features_BTH = inner.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(features_BTH[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=inner.past_key_values,
            hidden_states=(features_BTH,) if output_hidden_states else None,
        )
        return output if return_dict is not False else output.to_tuple()


class LstmForSequenceClassification(GenericForSequenceClassification, LstmPreTrainedModel):
    """One score (or several) from the last real token: a reward model, or a classifier."""


AutoConfig.register(LstmConfig.model_type, LstmConfig, exist_ok=True)
AutoModel.register(LstmConfig, LstmModel, exist_ok=True)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(LstmConfig, LstmForSequenceClassification, exist_ok=True)
LstmConfig.register_for_auto_class("AutoConfig")
LstmModel.register_for_auto_class("AutoModel")
LstmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LstmForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
