import json

import pytest

from d2g_jax.digits import captions, tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def clip_tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def vocabulary():
    return json.loads(tokenizer.tokenizer_files()["vocab.json"])


def test_every_caption_fits_and_each_word_is_one_token(clip_tokenizer, vocabulary):
    texts = [p.prompt for p in captions.evaluation_prompts(300, 0)]
    for text, ids in zip(texts, clip_tokenizer(texts).input_ids, strict=True):
        words = text.replace(",", " ,").split()
        assert ids == [
            vocabulary[START],
            *(vocabulary[word + "</w>"] for word in words),
            vocabulary[END],
        ]
        assert len(ids) <= tokenizer.MODEL_MAX_LENGTH


def test_round_trip(clip_tokenizer):
    for text in [p.prompt for p in captions.evaluation_prompts(20, 0)]:
        decoded = clip_tokenizer.decode(clip_tokenizer(text).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ,", ",").strip() == text


def test_ids_agree_with_our_own_byte_pair_encoding(clip_tokenizer, vocabulary):
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges_for(captions.words()))}
    for word in ("seven", "slantedly", "unbold", "rights", "qwxz"):
        ids = [vocabulary[symbol] for symbol in tokenizer.bpe(word, ranks)]
        assert clip_tokenizer(word).input_ids[1:-1] == ids


def test_special_tokens_and_length(clip_tokenizer, vocabulary):
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary[END] == len(vocabulary) - 1
    assert clip_tokenizer.model_max_length == tokenizer.MODEL_MAX_LENGTH
    assert clip_tokenizer.eos_token_id == clip_tokenizer.pad_token_id == vocabulary[END]
    assert clip_tokenizer.bos_token_id == vocabulary[START]


def test_any_text_is_encoded_and_truncated(clip_tokenizer, vocabulary):
    ids = clip_tokenizer("Café 😀 " * 9, padding="max_length", truncation=True).input_ids
    assert len(ids) == tokenizer.MODEL_MAX_LENGTH
    assert ids[-1] == vocabulary[END]
    padded = clip_tokenizer("bold 3", padding="max_length").input_ids
    assert padded[4:] == [vocabulary[END]] * 16
