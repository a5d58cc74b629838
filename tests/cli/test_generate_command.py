"""`funclora generate`: each row's answer is that of its own adapter alone, here and in PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import funclora as fl
from funclora._apps.train.base import Base, load_base, load_tokenizer
from funclora._apps.train.settings import Settings
from funclora.cli._app import app
from funclora.cli._generate import Generator, Sampling
from funclora.cli._loader import Loader
from funclora.demo.model import load_base as load_demo

WORDS = ["</s>", "<unk>", "<user>", "<assistant>", *(f"w{k}" for k in range(60))]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w3 w2 w1"]


def run(*args: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, args)], input=text)


def printed(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def complaint(*args: object, text: str | None = None) -> str:
    result = run(*args, text=text)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("funclora generate: ")
    return line


def jsonl(file: Path, *records: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def llama(size: int = 16, words: int = len(WORDS)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words, hidden_size=size, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, eos_token_id=0, bos_token_id=None, pad_token_id=None,
            initializer_range=0.5,
        )
    )  # fmt: skip


def words(folder: Path, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, and `adapters/` as PEFT writes them: LoRA and DoRA, of several ranks."""
    path = tmp_path_factory.mktemp("generate")
    llama().save_pretrained(path / "model")
    words(path / "model")
    for i, dora in enumerate((False, True, False)):
        torch.manual_seed(i)
        config = LoraConfig(
            r=2 + i, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=dora,
            init_lora_weights=False, task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(llama(), config).save_pretrained(path / "adapters" / f"ad-{i}")
    return path


def by_peft(folders: Path, prompt: str, adapter: str | None, tokens: int) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "model")
    model: Any = LlamaForCausalLM.from_pretrained(folders / "model")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, folders / "adapters" / adapter)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.eval().generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


# Rows


def test_each_row_has_its_own_adapter(folders: Path, tmp_path: Path) -> None:
    names: list[str | None] = ["ad-1", None, "ad-0", "ad-2", "ad-1"]
    records = [
        {"prompt": prompt, "n": i} | ({} if name is None else {"adapter": name})
        for i, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]
    file = jsonl(tmp_path / "p.jsonl", *records)
    found = printed(folders / "adapters", "--model", folders / "model", "-f", file, "--max-tokens", 12)
    expected = [by_peft(folders, prompt, name, 12) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert [row["completion"] for row in found["results"]] == expected
    assert [(row["adapter"], row["n"]) for row in found["results"]] == list(zip(names, range(5), strict=True))
    assert len(set(expected)) == len(expected)
    base_alone = [by_peft(folders, prompt, None, 12) for prompt in PROMPTS]
    assert sum(a != b for a, b in zip(expected, base_alone, strict=True)) == 4
    for rows in (1, 2):
        again = printed(
            folders / "adapters", "--model", folders / "model", "-f", file, "--max-tokens", 12, "--batch", rows
        )
        assert again["results"] == found["results"]
    for row, name in zip(found["results"], names, strict=True):  # and alone
        options = [folders / "adapters" / name] if name else []
        alone = printed(*options, "--model", folders / "model", "-p", row["prompt"], "--max-tokens", 12)
        assert [alone[key] for key in ("completion", "tokens", "ended", "adapter")] == [
            row[key] for key in ("completion", "tokens", "ended", "adapter")
        ]


def test_a_batch_takes_what_the_batch_before_has_prepared(folders: Path) -> None:
    """The adapters of different batches are in the same memory, DoRA's norms included."""
    settings = Settings(model=folders / "model")
    base = load_base(settings, load_tokenizer(settings))
    loader = Loader(base, {name: folders / "adapters" / name for name in ("ad-0", "ad-1")}, None)
    batches: list[Any] = [loader.route(names) for names in (["ad-0", "ad-1"], [None, "ad-1", "ad-0"])]
    leaves: list[list[Tensor]] = [optree.tree_leaves(batch) for batch in batches]
    first, second = ({leaf.data_ptr() for leaf in some if leaf.is_floating_point()} for some in leaves)
    assert first == second


def test_one_adapter_for_all_who_name_none(folders: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"}, {"prompt": "w1", "adapter": None})
    common = ("--model", folders / "model", "-f", file, "--max-tokens", 6)
    for args in ((folders / "adapters", "--adapter", "ad-2"), (folders / "adapters" / "ad-2",)):
        rows = printed(*args, *common)["results"]
        assert [row["adapter"] for row in rows] == ["ad-2", None]
        assert rows[0]["completion"] == by_peft(folders, "w1", "ad-2", 6)
        assert rows[1]["completion"] == by_peft(folders, "w1", None, 6)


def test_the_text_streams_as_it_comes(folders: Path) -> None:
    args = (folders / "adapters" / "ad-1", "--model", folders / "model", "--max-tokens", 12)
    result = run(*args, "-p", PROMPTS[2])
    assert result.exit_code == 0, result.stderr
    assert result.stdout == by_peft(folders, PROMPTS[2], "ad-1", 12) + "\n"


def test_streamed_pieces_are_several(folders: Path) -> None:
    from funclora._apps.train.base import load_base, load_tokenizer
    from funclora._apps.train.settings import Settings
    from funclora.cli._prompts import Reader

    settings = Settings(model=folders / "model")
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, tokenizer)
    prompt = Reader(tokenizer, len(WORDS), 64, decoder=True).text("w1 w2", None, "here")
    pieces: list[str] = []
    answer = Generator(base, {}, Sampling(tokens=8)).stream(prompt, pieces.append)
    assert "".join(pieces) == answer.text
    assert len([piece for piece in pieces if piece]) > 3


def test_answers_are_written_as_jsonl(folders: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1", "adapter": "ad-0"}, {"prompt": "é w2", "adapter": "ad-1"})
    args = (
        folders / "adapters",
        "--model",
        folders / "model",
        "-f",
        file,
        "--max-tokens",
        6,
        "-o",
        tmp_path / "o.jsonl",
    )
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'o.jsonl'}: 2 answers, ")
    written = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == printed(*args[:-2])["results"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "p.jsonl"]
    assert "already exists. Give another file, or --overwrite" in complaint(*args)
    before = (tmp_path / "o.jsonl").read_bytes()
    jsonl(file, {"prompt": "w1", "adapter": "ad-0"}, {"prompt": "w2", "adapter": "ad"})
    assert "p.jsonl:2: there is no adapter 'ad'. Near names: " in complaint(*args, "--overwrite")
    assert (tmp_path / "o.jsonl").read_bytes() == before


def test_rows_near_the_end_of_the_context(tmp_path: Path) -> None:
    """GPT-2's positions are a table: one token too many would be an index out of range."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words(tmp_path / "model")
    lengths = (3, 15, 8, 14)
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": " ".join(["w1", "w2", "w5"] * 6)[: 3 * n - 1]} for n in lengths))
    rows = printed("--model", tmp_path / "model", "-f", file, "--max-tokens", 6)["results"]
    assert [row["tokens"] for row in rows if not row["ended"]]
    assert all(row["tokens"] <= min(6, 16 - n) for row, n in zip(rows, lengths, strict=True))
    for row in rows:
        alone = printed("--model", tmp_path / "model", "-p", row["prompt"], "--max-tokens", 6)
        assert alone["completion"] == row["completion"]
    cut = run("--model", tmp_path / "model", "-f", file, "--max-tokens", 6)
    short = [n for row, n in zip(rows, lengths, strict=True) if not row["ended"] and row["tokens"] < 6]
    assert short
    told = f"{'2 answers are' if len(short) == 2 else 'an answer is'} cut off before --max-tokens 6: the context of "
    assert told in cut.stderr
    assert "has 16 tokens, including the prompt." in cut.stderr
    assert run("--model", tmp_path / "model", "-p", "w1", "--max-tokens", 6).stderr == ""
    long = " ".join(["w1"] * 16)
    message = complaint("--model", tmp_path / "model", "-p", long)
    assert (
        "--prompt: the prompt has 16 tokens; the model's context has 16, including the answer. Shorten the prompt."
        in message
    )


def test_an_encoder_and_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0,
        eos_token_id=0, pad_token_id=0, initializer_factor=3.0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = words(tmp_path / "model")
    adapters = []
    for i in range(2):
        lora = fl.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False, lora_alpha=16)
        adapters.append(fl.init(model, lora, generator=torch.Generator().manual_seed(i)))
        fl.save_peft(tmp_path / "adapters" / f"a{i}", adapters[-1], lora)
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": PROMPTS[2 * i], "adapter": f"a{i}"} for i in range(2)))
    rows = printed(tmp_path / "adapters", "--model", tmp_path / "model", "-f", file, "--max-tokens", 6)["results"]
    for i, row in enumerate(rows):
        bound = fl.bind(model, fl.base_params(model), adapters[i])
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = bound.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert row["completion"] == tokenizer.decode(out[0], skip_special_tokens=True)


def _bart(kind: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.MBartConfig(
        vocab_size=len(WORDS), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=64, init_std=0.5,
        eos_token_id=0, pad_token_id=1, bos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    return getattr(transformers, kind)(config)


def _recurrent_gemma() -> Any:
    torch.manual_seed(0)
    config = transformers.RecurrentGemmaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        lru_width=16, attention_window_size=8, eos_token_id=0, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.RecurrentGemmaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "model",
    [
        lambda: _bart("MBartForConditionalGeneration"),  # the encoder counts positions from the left
        lambda: _bart("MBartForCausalLM", is_decoder=True),  # so does the decoder, and takes no other count
        _recurrent_gemma,  # carries what stands before a row on into it
    ],
    ids=["encoder", "decoder", "recurrent"],
)
def test_no_row_sees_how_long_the_others_are(model: Any, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    words(tmp_path / "model")
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    common = ("--model", tmp_path / "model", "--max-tokens", 8)
    rows = printed(*common, "-f", file)["results"]
    alone = [printed(*common, "-p", prompt)["completion"] for prompt in PROMPTS]
    assert [row["completion"] for row in rows] == alone
    assert len(set(alone)) > 2


def test_what_the_folder_says_of_generation_breaks_no_rows(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "model", tmp_path / "model")
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": prompt} for prompt in PROMPTS))
    args = ("--model", tmp_path / "model", "-f", file, "--max-tokens", 6, "--temperature", 1)
    before = printed(*args)["results"]
    settings = tmp_path / "model" / "generation_config.json"
    own = json.loads(settings.read_text())
    settings.write_text(
        json.dumps(own | {"num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True})
    )
    assert printed(*args)["results"] == before
    settings.write_text(json.dumps(own | {"prompt_lookup_num_tokens": 2}))
    assert "transformers refuses to generate" in complaint(*args)


def test_the_tokenizers_end_token_ends_an_answer_too(folders: Path, tmp_path: Path) -> None:
    """It is what training puts after a completion, whatever token the folder's settings name."""
    shutil.copytree(folders / "model", tmp_path / "model")
    args = ("--model", tmp_path / "model", "-p", PROMPTS[0], "--max-tokens", 6)
    first = printed(*args)["completion"].split()
    settings = tmp_path / "model" / "generation_config.json"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.eos_token = first[1]
    tokenizer.save_pretrained(tmp_path / "model")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": 0}))
    found = printed(*args)
    assert (found["tokens"], found["ended"]) == (2, True)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [0, WORDS.index(first[0])]}))
    found = printed(*args)
    assert (found["tokens"], found["ended"]) == (1, True)


def test_packed_weights(folders: Path) -> None:
    from funclora._apps.train.base import load_base, load_tokenizer
    from funclora._apps.train.settings import Settings

    pytest.importorskip("bitsandbytes")
    args = (folders / "adapters" / "ad-1", "--model", folders / "model", "-p", PROMPTS[2], "--max-tokens", 12)
    found = printed(*args, "--quantize", "nf4")["completion"]
    settings = Settings(model=folders / "model", quantize="nf4")
    tokenizer = load_tokenizer(settings)
    base = load_base(settings, tokenizer)
    bound = fl.bind(base.model, base.params, fl.load_peft(folders / "adapters" / "ad-1", base.model)[0])
    assert found == base.generate(bound, PROMPTS[2], 12)
    assert found != printed(*args)["completion"]


# Drawing


def test_draws_are_decided_by_the_seed(folders: Path) -> None:
    args = (folders / "adapters" / "ad-0", "--model", folders / "model", "-p", "w1", "--max-tokens", 12)
    state = torch.get_rng_state()
    texts = [printed(*args, "--temperature", 1.5, "--seed", seed)["completion"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = printed(*args)["completion"]
    assert printed(*args, "--temperature", 1.5, "--top-k", 1)["completion"] == greedy
    assert printed(*args, "--temperature", 1.5, "--top-p", 1e-6)["completion"] == greedy


def test_draws_of_the_demo_are_those_of_transformers() -> None:
    """Of the same logits, the same tokens can be drawn, with the same probabilities."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(3, 50) * 3
    base = Base("toy", torch.nn.Linear(1, 1), {}, None, "causal-lm", None)
    for k, p in ((5, None), (None, 0.7), (9, 0.5)):
        warpers: list[Any] = [TemperatureLogitsWarper(0.8)]
        warpers += [TopKLogitsWarper(k)] if k else []
        warpers += [TopPLogitsWarper(p)] if p else []
        wanted = LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)
        generator = Generator(base, {}, Sampling(temperature=0.8, top_k=k, top_p=p))
        torch.testing.assert_close(generator.probabilities(logits), wanted)
        drawn = torch.stack([generator._next(logits) for _ in range(200)], 1)
        assert (wanted.gather(1, drawn) > 0).all()


# The demo's base


def test_the_demos_base_continues_bytes(tmp_path: Path) -> None:
    model = load_demo()
    adapters: dict[str | None, Any] = {None: {}}
    for i in range(2):
        config = fl.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_alpha=8)
        rules = fl.init(model, config, generator=torch.Generator().manual_seed(i))
        fl.save_peft(tmp_path / "adapters" / f"a{i}", rules, config)
        adapters[f"a{i}"] = rules
    texts, names = ["class ", "import os\n\n\ndef é" + "x" * 250, "x"], ["a1", "a0", None]
    file = jsonl(tmp_path / "p.jsonl", *({"prompt": t, "adapter": n} for t, n in zip(texts, names, strict=True)))
    rows = printed(tmp_path / "adapters", "-f", file, "--max-tokens", 20)["results"]
    for row, name, text in zip(rows, names, texts, strict=True):
        bound = fl.bind(model, fl.base_params(model), adapters[name])
        said = bound.generate(text.encode(), 20, temperature=0.0)
        assert row["completion"] == said[len(text.encode()) :].decode("utf-8", "replace")
        assert (row["tokens"], row["ended"]) == (20, False)
    assert len({row["completion"] for row in rows}) == 3
    streamed = run(tmp_path / "adapters" / "a1", "-p", "class ", "--max-tokens", 20)
    assert streamed.stdout == rows[0]["completion"] + "\n"


# Conversations


def test_messages_go_through_the_template(folders: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "w1 w2"}]
    file = jsonl(tmp_path / "p.jsonl", {"messages": talk, "adapter": "ad-1"})
    common = (folders / "adapters", "--model", folders / "model", "--max-tokens", 8)
    (row,) = printed(*common, "-f", file)["results"]
    assert row["messages"] == talk
    expected = by_peft(folders, "<user> w1 w2 <assistant>", "ad-1", 8)
    assert row["completion"] == expected
    one = printed(*common, "-p", "w1 w2", "--chat", "--adapter", "ad-1")
    assert one["completion"] == expected
    jsonl(file, {"messages": [{"role": "system", "content": "w1"}], "adapter": "ad-1"})
    assert "p.jsonl:1: the chat template refuses these messages: no system role" in complaint(*common, "-f", file)


def test_messages_go_through_a_template_in_a_file(folders: Path, tmp_path: Path) -> None:
    """Instead of that of the folder; where there is no chat, it would have no effect."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    )
    common = (folders / "adapters" / "ad-1", "--model", folders / "model", "--max-tokens", 8)
    given = (*common, "--chat-template", template)
    expected = by_peft(folders, "w1 w2 w3", "ad-1", 8)
    assert printed(*given, "-p", "w1 w2", "--chat")["completion"] == expected
    assert printed(*common, "-p", "w1 w2", "--chat")["completion"] != expected
    talk = {"messages": [{"role": "user", "content": "w1 w2"}]}
    file = jsonl(tmp_path / "p.jsonl", talk, {"prompt": "w1"})
    assert printed(*given, "-f", file)["results"][0]["completion"] == expected
    jsonl(file, {"prompt": "w1"})
    assert "--chat-template: no record of" in complaint(*given, "-f", file)
    assert "--chat-template can only be used with --chat, or" in complaint(*given, "-p", "w1")
    assert "is no file. Give the file of a Jinja" in complaint(*common, "-p", "w1", "--chat", "--chat-template", "no")
    assert "demo's base reads no chats" in complaint("-p", "w1", "--chat", "--chat-template", template)


def test_records_of_other_trainers_are_prompts_too(folders: Path, tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "p.jsonl",
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        {"instruction": "w1", "input": "", "output": "w2"},
    )
    common = (folders / "adapters" / "ad-1", "--model", folders / "model", "--max-tokens", 8, "-f", file)
    rows = printed(*common)["results"]
    assert [row["reference"] for row in rows] == ["w2"] * 3
    assert len({row["completion"] for row in rows}) == 1


def test_fields_and_roles_have_the_names_that_are_given(folders: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"dialog": [{"speaker": "reader", "content": "w1 w2"}]}, {"question": "w4"})
    common = (folders / "adapters" / "ad-1", "--model", folders / "model", "--max-tokens", 8, "-f", file)
    named = ("--fields", "messages=dialog,role=speaker,prompt=question", "--roles", "reader=user")
    chat, text = printed(*common, *named)["results"]
    assert chat["completion"] == by_peft(folders, "<user> w1 w2 <assistant>", "ad-1", 8)
    assert text["completion"] == by_peft(folders, "w4", "ad-1", 8)
    assert "p.jsonl:1: expected either" in complaint(*common)
    assert "fields: expected one of" in complaint(*common, "--fields", "promt=question")
    for option, value in (named[:2], named[2:]):
        assert f"{option} can only be used with --file." in complaint(*common[:3], option, value, "-p", "w1")


def test_a_records_own_answer_is_its_reference(folders: Path, tmp_path: Path) -> None:
    """It is neither shown to the model nor lost."""
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w7 w8"}]
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w4", "completion": "w5"}, {"messages": talk}, {"messages": talk[:1]})
    common = (folders / "adapters" / "ad-1", "--model", folders / "model", "--max-tokens", 8, "-f", file)
    pair, chat, alone = printed(*common)["results"]
    assert (pair["reference"], pair["completion"]) == ("w5", by_peft(folders, "w4", "ad-1", 8))
    expected = by_peft(folders, "<user> w1 w2 <assistant>", "ad-1", 8)
    assert (chat["reference"], chat["messages"], chat["completion"]) == ("w7 w8", talk[:1], expected)
    assert (alone["completion"], alone.get("reference")) == (expected, None)
    _, chat, alone = printed(*common, "--continue-final-message")["results"]
    assert chat["completion"] == by_peft(folders, "<user> w1 w2 <assistant> w7 w8", "ad-1", 8) != expected
    assert (chat["messages"], "reference" in chat, alone["completion"]) == (talk, False, expected)
    assert "--continue-final-message can only be used with --file." in complaint("-p", "x", "--continue-final-message")


def test_one_prompt_under_several_adapters(folders: Path, tmp_path: Path) -> None:
    common = (folders / "adapters", "--model", folders / "model", "--max-tokens", 8, "--adapter", "ad-1,ad-0")
    names = ["ad-1", "ad-0", None]
    expected = [by_peft(folders, "w1 w2", name, 8) for name in names]
    assert len(set(expected)) == 3
    results = printed(*common, "--adapter", "(base)", "-p", "w1 w2")["results"]
    assert [(row["adapter"], row["completion"]) for row in results] == list(zip(names, expected, strict=True))
    shown = run(*common, "--adapter", "(base)", "-p", "w1 w2").stdout.splitlines()
    assert shown[::2] == [f"--prompt under {name}" for name in ("ad-1", "ad-0", "(base)")]
    assert shown[1::2] == expected
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1 w2"}, {"prompt": "w1 w2", "adapter": None})
    results = printed(*common, "-f", file)["results"]
    assert [(row["adapter"], row["completion"]) for row in results] == list(zip(names, expected, strict=True))
    assert "a conversation is with one adapter at a time" in complaint(*common, text="w1\n")


def test_a_conversation(folders: Path) -> None:
    common = (folders / "adapters", "--model", folders / "model", "--max-tokens", 6)
    result = run(*common, text="w1 w2\n\n/adapter ad-2\nw1 w2\n/base\nw4\n")
    assert result.exit_code == 0, result.stderr
    asked = (("w1 w2", None), ("w1 w2", "ad-2"), ("w4", None))
    expected = [by_peft(folders, prompt, name, 6) for prompt, name in asked]
    assert result.stdout.splitlines() == expected
    talk = run(*common, "--chat", "--adapter", "ad-0", text="w1\nw2\n")
    first = by_peft(folders, "<user> w1 <assistant>", "ad-0", 6)
    second = by_peft(folders, f"<user> w1 <assistant> {first} <user> w2 <assistant>", "ad-0", 6)
    assert talk.stdout.splitlines() == [first, second]
    assert "line 2: there is no adapter 'ad-9'. Near names: ad-" in run(*common, text="w1\n/adapter ad-9\n").stderr


# What does not do


def test_options_that_contradict_each_other(folders: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "p.jsonl", {"prompt": "w1"})
    some, model = folders / "adapters", ("--model", folders / "model")
    cases: list[tuple[list[object], str]] = [
        (["-p", "x", "-f", file], "--prompt and --file exclude each other. Give one of them."),
        (["-p", "x", "-o", tmp_path / "o"], "--out can only be used with --file."),
        (["-f", file, "--chat"], '"messages" in place of "prompt"'),
        (["--json"], "--json cannot be used in a conversation."),
        (["-p", "x", "--top-p", 0.5], "--top-p needs sampling."),
        (["-p", "x", "--seed", 0], "--seed needs sampling."),
        (["-p", "x", "--top-p", 0, "--temperature", 1], "--top-p: expected a number above 0."),
        ([some, "-p", "x"], "--prompt: several adapters are given. Choose some with --adapter: ad-0, ad-1, ad-2."),
        ([some, "-p", "x", "--adapter", "ad-4"], "--adapter: there is no adapter 'ad-4'. Near names: ad-"),
        (["-p", "x", "--adapter", "ad-4"], "there is no adapter 'ad-4'. No adapters are given: name PEFT folders"),
        ([some, *model, "-f", file], "no record names one of the given adapters: ad-0, ad-1, ad-2."),
        ([tmp_path / "none", "-p", "x"], "none: there is no such folder. Give PEFT folders"),
        (["--model", tmp_path, "-p", "x"], "contains no config.json. Give the folder of a transformers model"),
        ([*model, "-p", "", ], "--prompt: the prompt is empty, so there is no token to continue."),
        (["-p", "x", "--chat"], "--prompt: the model's tokenizer has no chat template"),
        (["-p", "x", "--device", "toaster"], "device: 'toaster' cannot be used here"),
    ]  # fmt: skip
    for args, message in cases:
        assert message in complaint(*args), args


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "w1"}, 'p.jsonl:1: expected either "prompt" or "messages", got \'text\'.'),
        ({"prompt": "w1", "messages": []}, "expected either"),
        ({"prompt": 3}, "p.jsonl:1: prompt: expected a text, got 3."),
        ({"prompt": "w1", "ended": True}, "p.jsonl:1: has 'ended', which would be written over. Rename or remove it."),
        ({"prompt": "w1", "completion": "w2", "reference": "w3"}, "p.jsonl:1: has a reference, and an answer"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "the assistant's turn is the only one"),
        ({"prompt": "w1", "adapter": 3}, "p.jsonl:1: adapter: expected a name or null, got 3."),
        ({"prompt": "w1", "adapter": "da-1"}, "p.jsonl:1: there is no adapter 'da-1'. Near names: ad-1"),
        ({"messages": []}, "p.jsonl:1: messages: expected a list of objects"),
        ({"messages": [{"role": "user"}]}, "p.jsonl:1: messages[0]: content: expected a text, got None"),
    ],
)
def test_records_that_cannot_be_used(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, Any], message: str
) -> None:
    file = jsonl(tmp_path / "p.jsonl", record)
    monkeypatch.setattr("funclora._apps.train.base.load_base", None)  # said before the weights are loaded
    assert message in complaint(folders / "adapters", "--model", folders / "model", "-f", file)


@pytest.mark.parametrize(
    ("args", "words_"),
    [
        (("--temperature", "1e-45"), "--temperature: expected 0, or at least 0.001, got 1e-45."),
        (("--temperature", "1", "--seed", "9" * 20), "--seed: expected a number of 64 bits"),
    ],
)
def test_numbers_that_torch_cannot_take(folders: Path, args: tuple[str, ...], words_: str) -> None:
    assert words_ in complaint("--model", folders / "model", "-p", "w1", *args)


def test_bytes_that_are_no_text(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a terminal or a pipe of another encoding gives them."""
    for chat in ([], ["--chat"]):
        args = ("--model", folders / "model", *chat)
        assert "--prompt: contains bytes that are not UTF-8: 'w1 \\udcff'. Encode" in complaint(
            *args, "-p", "w1 \udcff"
        )
        monkeypatch.setattr("funclora.cli._converse._line", lambda sign: "w1 \udcff")
        assert "line 1: contains bytes that are not UTF-8" in complaint(*args)


def test_a_tokenizer_of_another_model(folders: Path, tmp_path: Path) -> None:
    llama(words=10).save_pretrained(tmp_path / "model")
    words(tmp_path / "model", template=None)
    message = complaint("--model", tmp_path / "model", "-p", "w1 w20")
    assert "--prompt: this prompt contains token 24, but the model's embedding has 10 rows." in message
    assert "no chat template" in complaint("--model", tmp_path / "model", "-p", "w1", "--chat")


def test_adapters_of_another_model(folders: Path, tmp_path: Path) -> None:
    def saved(model: Any, **options: Any) -> Path:
        lora = LoraConfig(r=2, **options)
        get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": "theirs"})
        )
        return tmp_path / "adapter"

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    vocabulary = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    messages = []
    for model, options, words_ in (
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}, "'c_attn' matches no module"),
        (llama(32), {"target_modules": ["q_proj"]}, "has shape [2, 32], expected [2, 16]"),
        (llama(words=70), vocabulary, f"has shape [70, 16], expected [{len(WORDS)}, 16]"),
    ):
        messages.append(complaint(saved(model, **options), "--model", folders / "model", "-p", "w1"))
        assert words_ in messages[-1]
        assert f"Is {folders / 'model'} its base model? adapter_config.json names 'theirs'." in messages[-1]
    assert "model.resize_token_embeddings(70)" in messages[-1]
    assert "Is the demo's base its base model?" in complaint(folders / "adapters" / "ad-0", "-p", "x")
