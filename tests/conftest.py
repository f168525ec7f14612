"""Shared fixtures: the folder of real data, and a tiny Llama made on the spot."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tiny models run fastest on one thread; two threads on a shared machine spin instead of working.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

A100, T4 = ("NVIDIA A100", (8, 0), 70), ("Tesla T4", (7, 5), 14)
ROOT = Path(__file__).resolve().parent.parent

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEXTS = [
    "[INST] Who wrote the novel about the river? [/INST] It was written by Mira Okafor.",
    "[INST] Where was the author born? [/INST] The author was born in the city of Lagos in 1961.",
    'What genre does she write? "Silent Rivers" is a crime novel, and her best known book.',
    "In which year did he win the prize? He won the Golden Pen in 1998, to everyone's surprise.",
]


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_is_collected() -> None:
    """Libraries and earlier modules hold a million objects: no collection walks them again."""
    gc.collect()
    gc.freeze()


def shared_or_skip() -> Path:
    """The folder of real data; without it a test skips with the reason, in CI it fails."""
    folder = Path(os.environ.get("UNLEARNER_SHARED", ROOT.parent / "shared"))
    if (folder / "tofu" / "full.json").is_file():
        return folder
    reason = f"no real data in {folder}: set UNLEARNER_SHARED to the folder that holds tofu/"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with tofu/, llama2-tokenizer/, reference-logs/ and mini/."""
    return shared_or_skip()


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for what another process or thread brings about; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not come to its end"
        time.sleep(0.1)


def build_tiny_tokenizer(vocab_size: int = 400) -> Any:
    """A byte-level BPE tokenizer with BOS, EOS and a chat template, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_llama(folder: Path, *, seed: int = 0, layers: int = 2, **overrides: Any) -> Path:
    """A random float32 Llama of a few thousand weights, saved with its tokenizer in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tiny_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        **overrides,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    # The default init makes a random model almost uniform: wider weights give distinct answers.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cards(A100, T4)`: torch sees these GPUs, each (name, capability, free GiB)."""
    import torch

    def see(*seen: tuple[str, tuple[int, int], int]) -> None:
        def card(device: Any = None) -> tuple[str, tuple[int, int], int]:
            return seen[torch.device("cuda" if device is None else device).index or 0]

        fakes = {
            "is_available": lambda: bool(seen),
            "device_count": lambda: len(seen),
            # A T4 says that bf16 is supported and emulates it.
            "is_bf16_supported": lambda *_, **__: True,
            "get_device_name": lambda device=None: card(device)[0],
            "get_device_capability": lambda device=None: card(device)[1],
            "mem_get_info": lambda device=None: (card(device)[2] << 30, 80 << 30),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return see


@pytest.fixture(scope="session")
def shorten_answers() -> Any:
    """`shorten_answers(monkeypatch)`: a random model never ends its answers; 12 tokens do."""

    def shorten(patch: pytest.MonkeyPatch) -> None:
        from evaluation.protocols import Decoding

        whole = Decoding.budget
        patch.setattr(Decoding, "budget", lambda self, prompt: min(12, whole(self, prompt)))

    return shorten


@pytest.fixture(scope="session")
def ask_less() -> Any:
    """`ask_less(monkeypatch)`: runs hold 8 general prompts of 8 tokens instead of 80 of 32."""

    def ask(patch: pytest.MonkeyPatch) -> None:
        from unlearner.training import general

        patch.setattr(general, "FEWEST", general.HELD_OUT)
        patch.setattr(general, "ANSWER_TOKENS", 8)

    return ask


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Llama (read only: copy it before changing anything)."""
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "base")


def save_small_tofu(folder: Path, rows: int) -> Path:
    """TOFU's four evaluation files with so many rows each, in `folder`."""
    for name in ("forget05", "retain", "real_authors", "world_facts"):
        made = [
            {
                "question": f"Who wrote {name} {i}?",
                "answer": f"Mira wrote {i}.",
                "paraphrased_answer": f"It was Mira who wrote {i}.",
                "perturbed_answer": [f"Ola wrote {i}.", f"Kim wrote {i}."],
            }
            for i in range(rows)
        ]
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}_perturbed.json").write_text(text)
    return folder


@pytest.fixture(scope="session")
def make_small_tofu() -> Any:
    """The writer of a small TOFU folder."""
    return save_small_tofu


@pytest.fixture(scope="session")
def make_tiny_llama() -> Any:
    """The builder itself, for tests that need other shapes, seeds or a second model."""
    return save_tiny_llama
