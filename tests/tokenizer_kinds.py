"""Small tokenizers of every kind that is in use, for tests of what must hold for all."""

KINDS = (
    "byte level",
    "byte level, space in front",
    "metaspace",
    "sentencepiece",
    "llama",
    "bytes of last resort",
    "wordpiece",
    "unigram",
    "unknown words",
    "letters",
)


def save_tokenizer(kind, path, texts, special="<s>"):
    """Trains one on texts and writes it; returns the path as a str. It asks for truncation, which must not happen."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    names = {"special_tokens": [special, "<unk>"], "show_progress": False}
    if kind.startswith("byte level"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space in front" in kind)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **names)
    elif kind in ("metaspace", "sentencepiece"):
        scheme = "never" if kind == "metaspace" else "first"
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.BpeTrainer(vocab_size=90, **names)
    elif kind in ("llama", "bytes of last resort"):
        letters = [] if kind == "llama" else list("abcdefghijklmnopqrstuvwxyz")
        every_byte = [f"<0x{i:02X}>" for i in range(256)]
        vocab = {name: i for i, name in enumerate([special, "<unk>", *every_byte, *letters])}
        if kind == "llama":
            vocab |= {name: len(vocab) + i for i, name in enumerate(["▁", "t", "h", "e", "c", "a", "▁t", "▁th"])}
        merges = [("▁", "t"), ("▁t", "h")] if kind == "llama" else []
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
        tokenizer.add_special_tokens([special])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        spaces, as_bytes = [decoders.Replace("\u2581", " ")], [decoders.ByteFallback(), decoders.Fuse()]
        both = (
            spaces + as_bytes if kind == "llama" else as_bytes + spaces
        )  # there the sign for a space is written in bytes
        tokenizer.decoder = decoders.Sequence([*both, decoders.Strip(" ", 1, 0)])
        trainer = None
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=90, **names)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **names)
    elif kind == "letters":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.NFD()
        tokenizer.decoder = decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=60, **names)
    else:
        unknown = None if kind == "words without unknown" else "<unk>"
        tokenizer = Tokenizer(models.WordLevel(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        if unknown is None:
            names["special_tokens"] = [special]
        trainer = trainers.WordLevelTrainer(**names)
    if trainer:
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    return str(path)
