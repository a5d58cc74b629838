"""Tokenizers over bytes, with the parts that differ between models: chat templates, special tokens at the ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}GENERATION{{ m['content'] + '<|im_end|>' }}END{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("GENERATION", "").replace("END", "")
MARKED = CHATML.replace("GENERATION", "{% generation %}").replace("END", "{%- endgeneration -%}")
# Mistral's way: turns must alternate, the end token ends a turn, and nothing asks for an answer.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# As models that think do: what an earlier turn thought is left out.
FORGETS = PLAIN.replace(
    "{{ m['content'] + '<|im_end|>' }}",
    "{{ ('<think>' if loop.last else '') + m['content'] + '<|im_end|>' }}",
)


def tokenizer(
    template: str | None = None,
    *,
    begins: bool = False,
    ends: bool = False,
    merges: Sequence[tuple[str, str]] = (),
    eos: str | None = "</s>",
    prefix: bool = False,
    segments: bool = False,
) -> Any:
    """transformers' tokenizer, a token a byte.

    Args:
        template: chat template.
        begins: every text gets `<s>`, as Llama's does.
        ends: every text gets `</s>`, as T5's does.
        merges: pairs of characters that are one token.
        eos: the end token.
        prefix: a space before every text, as RoBERTa's can have.
        segments: say of a pair which text each token belongs to, as BERT's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocabulary = {name: i for i, name in enumerate(names)}
    fast = Tokenizer(models.BPE(vocabulary, list(merges)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    around = (["<s>"] if begins else []) + ["$A"] + (["</s>"] if ends else [])
    if len(around) > 1:
        fast.post_processor = processors.TemplateProcessing(
            single=" ".join(around), pair=" ".join([*around, *(f"{part}:1" for part in around if part != "<s>")]
            ).replace("$A:1", "$B:1"), special_tokens=[("<s>", 1), ("</s>", 2)],
        )  # fmt: skip
    made = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token=eos, pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_input_names=["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"],
    )  # fmt: skip
    made.chat_template = template
    return made


def said(tokenizer: Any, example: Any) -> list[str]:
    """The texts of the stretches with loss."""
    stretches: list[list[int]] = []
    for before, label in zip([-100, *example.labels], example.labels, strict=False):
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(label)
    return [tokenizer.decode(ids) for ids in stretches]
