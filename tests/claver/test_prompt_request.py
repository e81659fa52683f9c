"""What a language model is shown keeps the rules that it is asked to keep, and what it says is read with care."""

import pytest
from claver.prompts.build import KINDS, load_tokenizer
from claver.prompts.request import EXAMPLES, ReplyError, Request, read_reply, rivals_of, taken
from claver.prompts.rules import near_duplicates, num_tokens, sentence_faults


def test_the_examples_keep_the_rules_that_they_teach():
    encoder = load_tokenizer()
    for name, rivals, sentences in EXAMPLES:
        assert list(sentences) == ["decomposition", "body_parts", "synonyms", "scene"]
        request = Request(name, rivals)
        found, faults = taken({k: list(v) for k, v in sentences.items()}, request, KINDS, {}, encoder, rivals)
        assert (sorted(found), faults) == (sorted(KINDS), [])
        assert max(num_tokens(text, encoder) for kind in sentences.values() for text in kind) < 40
    texts = [text for _, _, sentences in EXAMPLES for kind in sentences.values() for text in kind]
    assert near_duplicates(texts, 0.5) == []


def test_rivals_are_of_the_same_group_or_share_a_word():
    classes = ["archery", "drinking tea", "drinking beer", "javelin throw", "swimming"]
    assert rivals_of("Archery", classes) == ("javelin throw",)
    assert rivals_of("drinking tea", classes) == ("drinking beer",)
    assert rivals_of("swimming", classes) == ()


def test_a_reply_is_found_in_a_code_block_and_between_words():
    assert read_reply('Sure!\n```json\n{"a": ["}"]}\n```\nBye') == {"a": ["}"]}
    for text, message in (("no", "not a JSON object"), ('{"a": ', "not valid JSON"), ("{" * 5000, "not valid JSON")):
        with pytest.raises(ReplyError, match=message):
            read_reply(text)


def test_a_sentence_by_itself_may_have_77_tokens_and_no_more():
    encoder = load_tokenizer()
    fits = "a " * 74 + "a"
    assert num_tokens(fits, encoder) == 77
    assert sentence_faults(fits, encoder) == []
    assert sentence_faults(fits + " a", encoder) == ["has 78 CLIP tokens, at most 77 fit"]
