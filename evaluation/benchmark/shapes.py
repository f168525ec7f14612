"""Models of a known shape with random weights, on any device; nf4 is made block by block."""

from __future__ import annotations

from typing import Any

from unlearner.config import TARGET_MODULES

# (width, inner width, layers, heads, vocabulary)
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (64, 172, 2, 4, 32000),
    "small": (256, 688, 4, 8, 32000),
    "llama2-7b": (4096, 11008, 32, 32, 32000),
}


def new_llama(
    shape: str,
    device: str = "meta",
    dtype: str = "bfloat16",
    *,
    layers: int | None = None,
    load_in_4bit: bool = False,
) -> Any:
    """A Llama of the named shape with random (on meta: no) weights, built in this dtype.

    Args:
        shape: one of `SHAPES`.
        device: where the weights are.
        dtype: of the weights, and of the products of a 4-bit model.
        layers: another number of blocks than the shape has.
        load_in_4bit: nf4 linear layers in the blocks. They are quantised one block at a time on
            the CPU, so that a model of 7B never takes more than 4 GB.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    width, inner, depth, heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=0,
        num_attention_heads=heads,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
        pad_token_id=0,
    )
    kind = getattr(torch, dtype)
    # Not built in float32 and then cast: that takes twice the memory of a bf16 model.
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=kind)
    model.config.num_hidden_layers = layers or depth
    first = "cpu" if load_in_4bit and device != "meta" else device
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        for index in range(model.config.num_hidden_layers):
            with torch.device(first):
                block = LlamaDecoderLayer(model.config, index)
            if load_in_4bit:
                quantise_block(block)
            model.model.layers.append(block.to(device))
    finally:
        torch.set_default_dtype(before)
    return model


def quantise_block(block: Any) -> None:
    """Replaces the linear layers of a block by nf4 ones with double quantisation, in place.

    On the meta device bitsandbytes' kernels give the sizes alone.
    """
    import bitsandbytes as bnb
    import torch
    from bitsandbytes.functional import quantize_4bit

    for parent in list(block.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is not torch.nn.Linear:
                continue
            weight = linear.weight.data
            packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
            four = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            four.weight = bnb.nn.Params4bit(
                packed,
                requires_grad=False,
                quant_state=state,
                quant_type="nf4",
                bnb_quantized=True,
                module=four,
            )
            four.quant_state = state
            if hasattr(four, "support_avx512bf16_for_cpu"):
                four.support_avx512bf16_for_cpu = False  # see adapters.base.load
            setattr(parent, name, four)


def with_lora(model: Any, rank: int) -> Any:
    """The frozen model with a float32 LoRA of this rank on the seven projections."""
    from peft import LoraConfig

    from adapters.lora.peft_layers import wrap

    model.requires_grad_(False)
    shape = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGET_MODULES))
    return wrap(model, "default", shape)
