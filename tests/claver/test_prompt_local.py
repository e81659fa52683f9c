"""A Hugging Face model in a folder writes prompts too, without a network."""

import json

import claver_k400
import pytest
import torch
from chat_server import entry_for
from claver.prompts.files import load_prompts, read_prompt_file
from claver.prompts.models import ModelError, _chat_text, local_model
from claver.prompts.request import Request
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

CLASSES = ["juggling eggs", "folding a map"]


def save_model(folder, reply, *, context=4096, chat=False):
    """A GPT-2 of one layer that answers everything with `reply`, which is one word of its tokenizer, and ends."""
    vocabulary = {"<unk>": 0, "<end>": 1, reply: 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    if chat:
        fast.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=3,
        n_positions=context,
        n_embd=4,
        n_layer=1,
        n_head=1,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.zero_()
        model.transformer.ln_f.weight.fill_(1.0)
        model.transformer.wte.weight[0] = torch.tensor([3.0, -1.0, -1.0, -1.0])  # any word of the request
        model.transformer.wte.weight[2] = torch.tensor([-1.0, 3.0, -1.0, -1.0])  # the reply
        model.lm_head.weight.zero_()
        model.lm_head.weight[2, 0] = 50.0  # after the request, the reply
        model.lm_head.weight[1, 1] = 50.0  # after the reply, the end
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_a_local_model_makes_a_file(tmp_path, capsys, chat):
    reply = json.dumps(entry_for("juggling eggs", ("scene",), 2))
    folder = save_model(tmp_path / "small", reply, chat=chat)
    (tmp_path / "names.txt").write_text("juggling eggs\n")
    arguments = ["--classes", str(tmp_path / "names.txt"), "--out", str(tmp_path / "p.json"), "--local", str(folder)]
    arguments += ["--kinds", "scene", "--per-kind", "2", "--attempts", "1"]
    status = claver_k400.main(["prompts", "make", *arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert list(load_prompts(tmp_path / "p.json", ["juggling eggs"])["juggling eggs"]) == ["scene"]
    record = read_prompt_file(tmp_path / "p.json").header["made"]
    assert (record["model"], record["endpoint"]) == ("small", "local")
    assert record["usage"]["completion_tokens"] == 2
    assert {"transformers", "torch"} <= record["versions"].keys()


def test_a_model_that_knows_nothing_makes_nothing_and_says_so(tmp_path, capsys):
    folder = save_model(tmp_path / "small", "nonsense")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    arguments = ["--classes", str(tmp_path / "names.txt"), "--out", str(tmp_path / "p.json"), "--local", str(folder)]
    assert claver_k400.main(["prompts", "make", *arguments, "--attempts", "2"]) == 1
    assert "0 classes made, 0 found there, 2 failed; 4 requests" in capsys.readouterr().out


def test_a_request_that_does_not_fit_and_a_folder_without_a_model_are_refused(tmp_path):
    model = local_model(save_model(tmp_path / "small", "a", context=32))
    with pytest.raises(ModelError, match="tokens, the model takes 32"):
        model.ask(Request("juggling").messages(), seed=0, max_tokens=8, temperature=0.9, top_p=0.95)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ModelError, match=str(folder)):
            local_model(folder)
    assert claver_k400.main(["prompts", "make", "--classes", "x.txt", "--out", "y.json"]) == 1


def test_a_template_without_a_system_role_has_the_rules_with_the_first_request(tmp_path):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    folder = save_model(tmp_path / "small", "a", chat=True)
    model = local_model(folder)
    loop = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    model._tokenizer.chat_template = refuses + loop
    messages = Request("juggling").messages()
    text = _chat_text(model._tokenizer, messages)
    assert text.startswith(f"<user>{messages[0]['content']}\n\n{messages[1]['content']}\n<assistant>")
    assert model.ask(messages, seed=0, max_tokens=8, temperature=0.9, top_p=0.95).text == "a"
    model._tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ModelError, match="chat template of the model does not take the messages: never"):
        _chat_text(model._tokenizer, messages)


def test_no_code_of_the_folder_is_run_and_nobody_is_asked_whether_it_may(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "small", "a")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError, match="no model that transformers can read"):
        local_model(folder)
    assert not (tmp_path / "ran").exists()
