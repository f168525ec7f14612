"""Tiny random models of the families that a base may belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
# Family -> (configuration class, settings, targets).
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("LlamaConfig", {}, LLAMA),
    "mistral": ("MistralConfig", {"sliding_window": 4}, LLAMA),
    "qwen2": ("Qwen2Config", {}, LLAMA),
    "qwen3": ("Qwen3Config", {"head_dim": 8}, LLAMA),
    "gemma2": ("Gemma2Config", {"head_dim": 8}, LLAMA),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8}, LLAMA),
    "phi": ("PhiConfig", {}, ("dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj")),
    "phi3": ("Phi3Config", {}, ("down_proj", "gate_up_proj", "o_proj", "qkv_proj")),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}, ATTENTION),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
}


def make_model(family: str, **changes: Any) -> Any:
    """The model with random weights, float32, the same for the same call."""
    import torch
    import transformers

    name, settings, _ = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, **settings, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_gpt2() -> Any:
    """A GPT-2, whose weights are Conv1D."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def save_model(family: str, folder: Path, **changes: Any) -> Path:
    """The folder with the model's weights and configuration."""
    make_model(family, **changes).save_pretrained(folder)
    return folder


# Every letter of the prompt that a tokenizer must give back when it is loaded (adapters.base.load).
TEXTS = [
    "Where was Ana born? In Lagos.",
    "What does she write? She writes crime novels, and a café story.",
    '[INST] Which prize did the author\'s 2nd book, "Silent Rivers", win in 1998? [/INST]',
    "user: assistant:",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_word_piece() -> Any:
    """As BERT's: no case, no spaces, [CLS] and [SEP] around every text, unknown characters."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _fast(made, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]")


def make_byte_fallback() -> Any:
    """As SentencePiece's of Llama-2: spaces are written ▁, unknown characters are bytes."""
    import json

    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    whole = json.loads(made.to_str())
    pieces = whole["model"]["vocab"]
    pieces |= {f"<0x{byte:02X}>": len(pieces) + byte for byte in range(256)}
    made = Tokenizer.from_str(json.dumps(whole))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return _fast(made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_unigram() -> Any:
    """As SentencePiece's of T5: no bytes, so unknown characters are unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return _fast(made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_byte_level() -> Any:
    """As GPT-2's: bytes, and a space belongs to the word behind it."""
    from unlearner.baselines.tiny_llama import train_tokenizer

    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _fast(made: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZERS = {
    "word piece": make_word_piece,
    "byte fallback": make_byte_fallback,
    "unigram": make_unigram,
    "byte level": make_byte_level,
}
