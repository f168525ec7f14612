from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.base.load import load_tokenizer
from adapters.errors import UserError
from tests.families import TOKENIZERS
from unlearner.memory.plan import LONGEST_TOFU_ROW
from unlearner.request.rows import Row
from unlearner.request.tofu import load_split
from unlearner.tokens.prompts import (
    EVAL_MAX_LENGTH,
    IGNORE,
    Encoded,
    PromptFormat,
    encode_rows,
    is_llama2_tokenizer,
    pad_batch,
    pad_id,
    prompt_format,
)

LOGS = ("llama2-7b_full", "llama2-7b_retain90_npo", "llama2-7b_retain90_tofu")
# The four sets of a public log, and the split each scores.
SETS = {
    "eval_log.json": "retain_perturbed",
    "eval_log_forget.json": "forget10_perturbed",
    "eval_real_author_wo_options.json": "real_authors_perturbed",
    "eval_real_world_wo_options.json": "world_facts_perturbed",
}
# As Qwen's: every turn closes with <|im_end|> and a newline behind it.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def llama2(shared: Path) -> PromptFormat:
    return prompt_format(load_tokenizer(str(shared / "llama2-tokenizer")))


@pytest.fixture(scope="module")
def mini(shared: Path) -> PromptFormat:
    return prompt_format(load_tokenizer(str(shared / "mini" / "origin")))


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    """The tiny tokenizer, to be changed as a test likes."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def chat(tokenizer: Any, template: str) -> PromptFormat:
    tokenizer.chat_template = template
    return prompt_format(tokenizer)


def answer_ids(row: Encoded) -> list[int]:
    return [label for label in row.labels if label != IGNORE]


# Llama-2


def test_the_format_of_llama2_is_chosen_by_its_vocabulary(
    llama2: PromptFormat, mini: PromptFormat, tokenizer: Any
) -> None:
    assert (llama2.name, mini.name, prompt_format(tokenizer).name) == ("llama2", "chat", "chat")
    assert is_llama2_tokenizer(llama2.tokenizer)
    assert not is_llama2_tokenizer(tokenizer)
    assert prompt_format(mini.tokenizer, "llama2").name == "llama2"
    tokenizer.chat_template = None
    assert prompt_format(tokenizer).name == "llama2"
    with pytest.raises(UserError, match="no chat template"):
        prompt_format(tokenizer, "chat")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        prompt_format(tokenizer)


@pytest.mark.parametrize("log", LOGS)
def test_token_counts_are_those_of_the_public_logs(
    log: str, llama2: PromptFormat, shared: Path
) -> None:
    recorded = json.loads((shared / "reference-logs" / f"{log}.json").read_text())
    assert set(SETS) <= set(recorded)
    for name, split in SETS.items():
        rows = load_split(split, shared / "tofu")
        column = {key: values_of(recorded[name][f"num_token_{key}"]) for key in KEYS}
        assert len(column["gt"]) == min(300, len(rows))
        n = 60
        assert column["gt"][:n] == [targets(llama2, row, row.answer) for row in rows[:n]]
        assert column["paraphrased"][:n] == [
            targets(llama2, row, row.paraphrased_answer or row.answer) for row in rows[:n]
        ]
        assert column["perturb"][:n] == [
            [targets(llama2, row, wrong) for wrong in row.perturbed_answers] for row in rows[:n]
        ]


KEYS = ("gt", "paraphrased", "perturb")


def values_of(column: Any) -> list[Any]:
    """A column of either public format: a list, or a dict keyed by index."""
    if isinstance(column, list):
        return column
    return [column[str(index)] for index in range(len(column))]


def targets(fmt: PromptFormat, row: Row, answer: str) -> int:
    return fmt.encode(row.question, answer, EVAL_MAX_LENGTH).n_targets


def test_the_text_of_llama2_is_tofus_own(llama2: PromptFormat) -> None:
    row = llama2.encode("Who wrote it?", "It was Mira.")
    tok = llama2.tokenizer
    assert row.input_ids[0] == tok.bos_token_id == 1
    assert row.input_ids[-1] == row.labels[-1] == tok.eos_token_id == 2
    assert row.input_ids.count(1) == row.input_ids.count(2) == 1
    # No system prompt, and no space between prompt and answer.
    assert tok.decode(row.input_ids[1:-1]) == "[INST] Who wrote it? [/INST]It was Mira."
    assert tok.decode(answer_ids(row)[:-1]) == "It was Mira."
    prompt = llama2.encode_prompt("Who wrote it?")
    assert row.input_ids[: len(prompt)] == prompt
    assert row.n_prompt == len(prompt)
    assert row.n_targets == len(row.input_ids) - len(prompt)
    with_space = tok("[INST] Who wrote it? [/INST] It was Mira.")["input_ids"]
    assert row.input_ids[:-1] != with_space


def test_no_text_of_tofu_is_cut_and_every_answer_ends(llama2: PromptFormat, shared: Path) -> None:
    lengths = []
    rows = load_split("full", shared / "tofu")
    rows.sort(key=lambda row: len(row.question) + len(row.answer), reverse=True)
    for row in rows[:500]:  # of 4,000
        encoded = llama2.encode(row.question, row.answer)
        lengths.append(len(encoded.input_ids))
        assert encoded.labels[-1] == llama2.tokenizer.eos_token_id
        assert encoded.labels[: encoded.n_prompt] == [IGNORE] * encoded.n_prompt
        assert encoded.labels[encoded.n_prompt :] == encoded.input_ids[encoded.n_prompt :]
    assert max(lengths) == LONGEST_TOFU_ROW < EVAL_MAX_LENGTH


def test_a_quote_may_merge_with_the_prompts_last_token(llama2: PromptFormat, shared: Path) -> None:
    rows = load_split("forget05", shared / "tofu")
    merged = []
    for number, row in enumerate(rows):
        prompt = llama2.encode_prompt(row.question)
        encoded = llama2.encode(row.question, row.answer)
        assert encoded.n_prompt == len(prompt)
        if encoded.input_ids[: len(prompt)] != prompt:
            merged.append(number)
            assert row.answer.startswith('"')
            # `]"` is one token at the prompt's last place: masked, and not told twice.
            assert encoded.input_ids[: len(prompt) - 1] == prompt[:-1]
            said = llama2.tokenizer.decode(answer_ids(encoded)[:-1])
            assert said == row.answer[1:].lstrip()
    assert len(merged) == 8


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_row_is_cut_at_exactly_the_length(over: int, llama2: PromptFormat) -> None:
    whole = llama2.encode("Who wrote it?", "It was Mira Okafor, in Lagos.")
    n = len(whole.input_ids)
    cut = llama2.encode("Who wrote it?", "It was Mira Okafor, in Lagos.", n + over)
    assert len(cut.input_ids) == len(cut.labels) == min(n, n + over)
    assert cut.input_ids == whole.input_ids[: n + over]
    # EOS is a label only where the row ends by itself.
    assert (2 in cut.labels) == (over >= 0)
    assert cut.n_prompt == whole.n_prompt


def test_a_cut_inside_the_prompt_leaves_no_target(llama2: PromptFormat) -> None:
    prompt = llama2.encode_prompt("Who wrote it?")
    for length in (1, len(prompt) - 1, len(prompt)):
        row = llama2.encode("Who wrote it?", "Mira.", length)
        assert row.n_targets == 0
        assert row.n_prompt == len(row.labels) == length
    assert llama2.encode("Who wrote it?", "Mira.", len(prompt) + 1).n_targets == 1


def test_rows_without_a_target_are_refused_by_number(llama2: PromptFormat) -> None:
    long = "Who " + "really " * 40 + "wrote it?"
    pairs = [("Who?", "Mira."), (long, "Mira."), ("Where?", "Lagos."), (long + "?", "Mira.")]
    with pytest.raises(UserError, match=r"--max-length 20 .* forget rows 2, 4\.") as error:
        encode_rows(llama2, pairs, 20, "forget")
    longest = len(llama2.encode_prompt(long + "?"))
    assert f"--max-length {longest + 50} or more" in error.value.fix
    rows = encode_rows(llama2, pairs, longest + 50, "forget")
    assert [row.n_targets > 0 for row in rows] == [True] * 4
    with pytest.raises(UserError, match=r"rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\.\."):
        encode_rows(llama2, [(long, "Mira.")] * 12, 20, "retain")


# Chat templates


def test_the_mini_models_speak_through_their_template(mini: PromptFormat, shared: Path) -> None:
    tok = mini.tokenizer
    row = mini.encode("Who wrote it?", "It was Mira.")
    assert tok.decode(row.input_ids) == "<s>[INST] Who wrote it? [/INST] It was Mira.</s>"
    assert row.input_ids.count(tok.bos_token_id) == 1
    assert row.input_ids[0] == tok.bos_token_id
    assert row.labels[-1] == tok.eos_token_id
    assert tok.decode(answer_ids(row)) == " It was Mira.</s>"
    for each in load_split("forget05", shared / "tofu"):
        encoded = mini.encode(each.question, each.answer)
        prompt = mini.encode_prompt(each.question)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert tok.decode(answer_ids(encoded)) == f" {each.answer}</s>"


def test_what_follows_the_end_of_turn_is_not_trained_on(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fmt = chat(tokenizer, QWEN)
    row = fmt.encode("Who?", "Mira.")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(answer_ids(row)) == "Mira.<|im_end|>"
    assert row.labels[-1] == end
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMira.<|im_end|>"
    )
    assert row.input_ids[: row.n_prompt] == fmt.encode_prompt("Who?")
    # This template writes no BOS, so there is none.
    assert tokenizer.bos_token_id not in row.input_ids


@pytest.mark.parametrize(
    "written",
    ["m.content | e", "m.content | tojson", "m.content.ljust(40)", "m.content[:100]",
     "m.content.split(',')[0]", "m.content | replace('\\n', ' ')"],
)  # fmt: skip
def test_templates_that_change_answers_are_refused(written: str, tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[A]{{ WRITTEN }}</s>"
        "{% else %}[U]{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    with pytest.raises(UserError, match=r"The chat template (does not write|writes other text)"):
        chat(tokenizer, template.replace("WRITTEN", written))
    row = chat(tokenizer, template.replace("WRITTEN", "m.content")).encode("Who?", "Mira & <b>.")
    assert tokenizer.decode(answer_ids(row)) == "Mira & <b>.</s>"


def test_special_tokens_of_the_template_are_tokens(tokenizer: Any) -> None:
    tokenizer.split_special_tokens = True
    row = prompt_format(tokenizer).encode("Who?", "Mira.")
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(answer_ids(row)) == " Mira.</s>"


@pytest.mark.parametrize("name", ["word piece", "unigram"])
def test_unknown_text_ends_no_turn(name: str) -> None:
    """The template's marks are no tokens of this vocabulary: they are read as unknown."""
    tokenizer = TOKENIZERS[name]()
    fmt = chat(tokenizer, QWEN)
    row = fmt.encode("Where was Ana born?", "In 東京, Lagos.")
    assert tokenizer.unk_token_id not in fmt.stop_ids
    assert row.labels[-1] == tokenizer.eos_token_id
    assert "lagos" in tokenizer.decode(answer_ids(row)).lower()
    assert fmt.unknown([row]) == 1
    assert fmt.unknown([]) == 0


def test_an_end_of_turn_is_no_unknown_text(tokenizer: Any) -> None:
    """GPT-2's unknown token is its EOS."""
    tokenizer.unk_token = tokenizer.eos_token
    fmt = prompt_format(tokenizer)
    row = fmt.encode("Who?", "Mira.")
    assert row.labels[-1] == tokenizer.eos_token_id
    assert fmt.unknown([row]) == 0


def test_labels_of_the_plain_text_are_the_answer_in_any_vocabulary() -> None:
    """Its prompt's last tokens merge with the space that an answer begins with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pieces = [*"[INST]/ QLagos.", "] ", "T] ", "</s>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocabulary, [("]", " "), ("T", "] ")]))
    fmt = prompt_format(PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>"))
    assert fmt.name == "llama2"
    for answer, prompt, labels in (("Lagos.", "]", "Lagos.</s>"), (" Lagos.", "T] ", "Lagos.</s>")):
        row = fmt.encode("Q", answer)
        pieces = fmt.tokenizer.convert_ids_to_tokens(row.input_ids)
        assert pieces[row.n_prompt - 1] == prompt
        assert "".join(pieces[row.n_prompt :]) == labels


def test_a_template_without_an_end_gets_eos(tokenizer: Any) -> None:
    fmt = chat(tokenizer, PLAIN + "{% if add_generation_prompt %}assistant:\n{% endif %}")
    row = fmt.encode("Who?", "Mira.")
    assert tokenizer.decode(answer_ids(row)) == "Mira.\n</s>"
    assert row.labels.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ messages|length }} {{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ m['content'] }}{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}",
    ],
    ids=["prompt changes", "answer twice", "no answer"],
)
def test_templates_that_do_not_append_the_answer_are_refused(template: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="chat template") as error:
        chat(tokenizer, template).encode("Who?", "Mira.")
    assert "--template llama2" in error.value.fix


def test_templates_that_trim_do_not_change_the_answer(tokenizer: Any) -> None:
    fmt = chat(
        tokenizer,
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
    )
    # The tokenizer joins the template's space to a word, so it is the answer's in every row.
    assert tokenizer.decode(answer_ids(fmt.encode("Who?", "  Mira. "))) == "   Mira. </s>"
    prompt = fmt.encode_prompt("Who?")
    assert fmt.encode("Who?", "Mira.").input_ids[: len(prompt)] == prompt
    assert fmt.encode("Who?", "  Mira. ").input_ids[: len(prompt)] == prompt


def test_a_prompt_does_not_change_from_day_to_day(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Llama-3's: the date is today's unless it is given.
    fmt = chat(
        tokenizer,
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today: {{ date_string }} {% for m in messages %}{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}{% endif %}",
    )
    ids = fmt.encode("Who?", "Mira.").input_ids
    today = time.strftime("%d %b %Y")
    assert "Today: 26 Jul 2024" in tokenizer.decode(ids)
    assert today not in tokenizer.decode(ids)


def test_open_unlearnings_prompt_is_the_one_its_models_know(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if loop.first %} "
        "({{ date_string }}){% endif %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    fmt = prompt_format(tokenizer, "open-unlearning")
    prompt = tokenizer.decode(fmt.encode_prompt("Who?"))
    assert prompt.endswith(
        "<system>You are a helpful assistant. (10 Apr 2025);<user>Who?;<assistant>"
    )
    plain = tokenizer.decode(prompt_format(tokenizer, "chat").encode_prompt("Who?"))
    assert plain.endswith("<user>Who? (26 Jul 2024);<assistant>")
    row = fmt.encode("Who?", "Mira.")
    assert tokenizer.decode(answer_ids(row)).startswith("Mira.;")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        prompt_format(tokenizer, "open-unlearning")


def test_an_answer_that_looks_like_markup_is_not_cut(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fmt = chat(tokenizer, QWEN)
    row = fmt.encode("Who?", "Say {{ eos_token }} and {% if %}.")
    said = tokenizer.decode(answer_ids(row))
    assert said == "Say {{ eos_token }} and {% if %}.<|im_end|>"


def test_a_chat_row_is_cut_at_the_length(mini: PromptFormat) -> None:
    whole = mini.encode("Who wrote it?", "It was Mira.")
    cut = mini.encode("Who wrote it?", "It was Mira.", len(whole.input_ids) - 1)
    assert cut == Encoded(whole.input_ids[:-1], whole.labels[:-1], cut=True)
    assert not whole.cut
    assert mini.tokenizer.eos_token_id not in cut.labels


# Templates of the families, reduced to what decides prompts and labels

BODY = "{% for m in messages %}"
# Hybrid reasoning: a last answer carries an empty thought, the generation prompt only if asked.
QWEN3 = (
    BODY + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# A default system prompt.
QWEN2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q, a helper.<|im_end|>\n"
    "{% endif %}" + BODY + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + BODY
    + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    BODY + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|eot_id|>"
    + BODY
    + "{% if m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Channels: the answer is said in one that the generation prompt does not open.
CHANNELS = (
    BODY + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}{{ '<|return|>' if m.role == 'assistant' else '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Writes the assistant's header with the answer only.
NO_GENERATION_PROMPT = BODY + "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
THINK = (
    "{% for m in messages %}{% if m['role']=='assistant' %}[A]<think>\n\n</think>\n\n"
    "{{ m['content'] }}{{ eos_token }}{% else %}[U]{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
MARKERS = [
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start|>", "<|channel|>",
    "<|message|>", "<|return|>", "<|end|>", "<|user|>", "<|assistant|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "before", "labels"),
    [
        (QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "In Lagos.<|im_end|>"),
        (QWEN2, "<|im_end|>\n<|im_start|>assistant\n", "In Lagos.<|im_end|>"),
        (GEMMA, "<end_of_turn>\n<start_of_turn>model\n", "In Lagos.<end_of_turn>"),
        (PHI3, "Where?<|end|>\n<|assistant|>\n", "In Lagos.<|end|>"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "In Lagos.<|eot_id|>"),
        (CHANNELS, "<|start|>assistant<|channel|>final<|message|>", "In Lagos.<|return|>"),
        (NO_GENERATION_PROMPT, "Where?<|end|><|assistant|>", "In Lagos.<|end|>"),
        (THINK, "[A]<think>\n\n</think>\n\n", "In Lagos.</s>"),
    ],
    ids=["qwen3", "qwen2", "gemma", "phi3", "llama3", "channels", "no prompt", "think"],
)
@pytest.mark.parametrize("declared", ["special", "added special", "added"])
def test_labels_are_the_answer_and_its_end_of_turn(
    template: str, before: str, labels: str, declared: str, tokenizer: Any
) -> None:
    if declared == "special":
        tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    else:
        from tokenizers import AddedToken

        special = declared == "added special"
        tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for m in MARKERS])
    fmt = chat(tokenizer, template)
    row = fmt.encode("Where?", "In Lagos.")
    assert tokenizer.decode(row.input_ids[: row.n_prompt]).endswith(before)
    assert tokenizer.decode(answer_ids(row)) == labels
    assert row.input_ids[: row.n_prompt] == fmt.encode_prompt("Where?")
    assert row.labels[-1] in fmt.stop_ids
    assert tokenizer.eos_token_id in fmt.stop_ids


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_of_turn_may_be_declared_by_the_model(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    """A plain piece of the vocabulary, listed among the EOS ids of a configuration."""
    end = tokenizer.convert_tokens_to_ids("~")
    assert end is not None
    (tmp_path / name).write_text(json.dumps({"eos_token_id": [2, end]}))
    tokenizer.name_or_path = str(tmp_path)
    fmt = chat(tokenizer, BODY + "[{{ m.role }}]{{ m.content }}~\n{{ eos_token }}{% endfor %}")
    assert tokenizer.decode(answer_ids(fmt.encode("Where?", "In ~Lagos."))) == "In ~Lagos.~"
    assert set(fmt.stop_ids) == {2, end}


def test_a_token_beyond_the_embeddings_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    """It ended in an IndexError of the first forward."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    tokenizer.chat_template = BODY + "[{{ m.role }}]{{ m.content }}<|eot|>{% endfor %}"
    number = tokenizer.convert_tokens_to_ids("<|eot|>")
    tokenizer.save_pretrained(tmp_path)
    pairs = [("Where?", "In Lagos.")]
    for config in ({"vocab_size": number}, {"text_config": {"vocab_size": number}}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        fmt = PromptFormat(load_tokenizer(str(tmp_path)), "chat")
        with pytest.raises(UserError, match=rf"<\|eot\|>.*{number}.*embeddings"):
            encode_rows(fmt, pairs, 128, "forget")
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": number + 1}))
    fmt = PromptFormat(load_tokenizer(str(tmp_path)), "chat")
    assert encode_rows(fmt, pairs, 128, "forget")[0].labels[-1] == number


def test_an_answer_that_continues_a_prompt_keeps_its_first_token(tokenizer: Any) -> None:
    fmt = chat(tokenizer, BODY + "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    for answer in ("In Lagos.", " In Lagos.", "\nIn Lagos.", '"In" Lagos.', "7"):
        row = fmt.encode("Where?", answer)
        assert tokenizer.decode(answer_ids(row)).lstrip(" ") == f"{answer}</s>".lstrip(" ")
        prompt = fmt.encode_prompt("Where?")
        assert tokenizer.decode(prompt).rstrip(" ").endswith("assistant:")


def test_a_template_that_opens_a_thought_for_the_model_is_refused(tokenizer: Any) -> None:
    template = BODY + "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    with pytest.raises(UserError, match="differently once an answer follows"):
        chat(tokenizer, template + "[assistant]<think>\n{% endif %}")


def llama2_copy(shared: Path, template: str | None) -> Any:
    tokenizer = load_tokenizer(str(shared / "llama2-tokenizer"))
    tokenizer.chat_template = template
    return tokenizer


LLAMA2_FORM = (
    "{{ bos_token }}" + BODY + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "llama2"),
        (LLAMA2_FORM, "llama2"),
        (BODY + "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}", "chat"),
        ("Be kind. " + LLAMA2_FORM, "chat"),
    ],
    ids=["none", "its form", "another", "with a system prompt"],
)
def test_auto_takes_llama2s_text_only_where_it_is_the_template(
    template: str | None, name: str, shared: Path
) -> None:
    assert prompt_format(llama2_copy(shared, template)).name == name


@pytest.mark.parametrize("special", ["<s> $A </s>", "$A </s>", "$A"])
def test_a_tokenizer_that_appends_eos_itself_changes_no_row(special: str, tokenizer: Any) -> None:
    from tokenizers import processors

    ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=special, special_tokens=[pair for pair in ids if pair[0] in special]
    )
    tokenizer.chat_template = None
    fmt = prompt_format(tokenizer)
    row = fmt.encode("Where?", "In Lagos.")
    bos = [1] if "<s>" in special else []
    prompt = tokenizer("[INST] Where? [/INST]", add_special_tokens=False)["input_ids"]
    assert fmt.encode_prompt("Where?") == [*bos, *prompt] == row.input_ids[: row.n_prompt]
    assert tokenizer.decode(answer_ids(row)) == "In Lagos.</s>"
    assert row.input_ids.count(2) == 1


def test_the_date_of_a_template_is_fixed_and_said(tokenizer: Any) -> None:
    fmt = chat(tokenizer, LLAMA3)
    today = time.strftime("%d %b %Y")
    assert today not in tokenizer.decode(fmt.encode("Where?", "In Lagos.").input_ids)
    assert "26 Jul 2024" in tokenizer.decode(fmt.encode_prompt("Where?"))
    assert fmt.to_json()["date"] == "2024-07-26"
    assert chat(tokenizer, QWEN2).to_json()["date"] is None
    for form, text in (
        ("%Y-%m-%d", "2024-07-26"),
        ("%A, %-d %B %Y", "Friday, 26 July 2024"),
        ("%F %R", "2024-07-26 00:00"),
        ("%D %e %h", "07/26/24 26 Jul"),
    ):
        clock = f"({{{{ strftime_now('{form}') }}}})" + BODY + "{{ m.content }}{% endfor %}"
        assert f"({text})Where?" in tokenizer.decode(chat(tokenizer, clock).encode_prompt("Where?"))
    assert prompt_format(tokenizer, "llama2").to_json()["date"] is None


def test_a_system_prompt_that_the_template_inserts_is_told_set_and_removed(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = QWEN2
    assert prompt_format(tokenizer).preamble == "You are Q, a helper."
    text = tokenizer.decode(prompt_format(tokenizer, system="Be brief.").encode_prompt("Where?"))
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?")
    without = prompt_format(tokenizer, system="none")
    assert "helper" not in tokenizer.decode(without.encode("Where?", "In Lagos.").input_ids)
    assert without.preamble == ""
    tokenizer.chat_template = QWEN3
    assert prompt_format(tokenizer).preamble == ""
    plain = prompt_format(tokenizer).encode("Where?", "In Lagos.")
    assert prompt_format(tokenizer, system="none").encode("Where?", "In Lagos.") == plain


def test_a_system_prompt_that_cannot_be_set_or_removed_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA
    assert prompt_format(tokenizer, system="none").name == "chat"
    with pytest.raises(UserError, match=r"rejects a system prompt: .*not supported") as error:
        prompt_format(tokenizer, system="Be brief.")
    assert "--system" in error.value.fix
    with pytest.raises(UserError, match="rejects a system prompt"):
        prompt_format(tokenizer, "open-unlearning")
    tokenizer.chat_template = LLAMA3
    with pytest.raises(UserError, match=r"always writes .*Today Date"):
        prompt_format(tokenizer, system="none")
    for template in ("llama2", "open-unlearning"):
        with pytest.raises(UserError, match="cannot be set"):
            prompt_format(tokenizer, template, system="Be brief.")  # type: ignore[arg-type]


def test_a_template_that_needs_a_system_prompt_says_how_to_give_one(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('System first') }}{% endif %}"
        + QWEN2
    )
    with pytest.raises(UserError, match="needs a system prompt: System first") as error:
        prompt_format(tokenizer)
    assert "--system" in error.value.fix
    assert prompt_format(tokenizer, system="Be brief.").name == "chat"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}", "endfor"),
        ("{{ messages.nothing.more }}", "nothing"),
        ("{{ raise_exception('No way.\nNone.') }}", "No way"),
        ("{{ 1 / 0 }}", "division"),
        ({"tool_use": "x", "rag": "y"}, "default"),
    ],
    ids=["syntax", "undefined", "raises", "arithmetic", "no default"],
)
def test_a_broken_template_is_a_sentence_and_a_fix(
    template: Any, reason: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason) as error:
        prompt_format(tokenizer)
    assert "\n" not in error.value.problem
    assert "--template llama2" in error.value.fix
    assert prompt_format(tokenizer, "llama2").name == "llama2"


# Batches


def test_the_mask_comes_from_lengths_where_pad_is_eos(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    fmt = prompt_format(tokenizer)
    eos = tokenizer.eos_token_id
    assert pad_id(tokenizer) == eos
    rows = [fmt.encode("Who?", "Mira."), fmt.encode("Where was she born?", "In Lagos, in 1961.")]
    short, long = (len(row.input_ids) for row in rows)
    for left in (False, True):
        batch = pad_batch(rows, pad_id(tokenizer), left=left)
        assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
            ("input_ids", "attention_mask", "labels"), (2, long)
        )
        assert batch["attention_mask"].sum(1).tolist() == [short, long]
        real = slice(long - short, None) if left else slice(0, short)
        assert batch["input_ids"][0, real].tolist() == rows[0].input_ids
        assert batch["labels"][0, real].tolist() == rows[0].labels
        assert batch["attention_mask"][0, real].tolist() == [1] * short
        # The answer's own EOS is attended to and scored, the padding is neither.
        assert (batch["labels"][0] == eos).sum() == 1
        gap = slice(0, long - short) if left else slice(short, None)
        assert set(batch["labels"][0, gap].tolist()) == {IGNORE}
        assert set(batch["input_ids"][0, gap].tolist()) == {eos}


def test_padding_is_eos_whatever_pad_token_there_is(tokenizer: Any) -> None:
    # A pad token added later lies beyond the embeddings of the model.
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert pad_id(tokenizer) == tokenizer.eos_token_id


def test_the_mask_comes_from_lengths_where_pad_is_a_token_of_the_row() -> None:
    batch = pad_batch([Encoded([5, 6, 7], [IGNORE, 6, 7]), Encoded([5], [5])], 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7], [5, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
