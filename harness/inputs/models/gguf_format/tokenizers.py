"""Tokenizers into GGUF's metadata and back.

Three kinds: byte-level BPE ('gpt2'), a SentencePiece vocabulary ('llama'), and none of GGUF's own. A tokenizer of the
last sort (word-level, as the tiny models have) goes into the file as the JSON that GGUF's specification provides for it
(`tokenizer.huggingface.json`), which llama.cpp does not read: it takes token ids only then.

How a byte-level tokenizer cuts text before it merges is one word in the file (`tokenizer.ggml.pre`); one that is not
known here is refused, since any other cut gives other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, HarnessError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of ggml
SPACE = "\u2581"  # SentencePiece's blank
WHOLE = "tokenizer.huggingface.json"
TOKENS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True)
class Splitter:
    """How a byte-level tokenizer cuts a text into the pieces that it merges in."""

    normalizer: str = ""
    digits: bool = False  # split off one by one, before GPT-2's expression splits the rest
    pattern: str = ""  # instead of GPT-2's
    whole: bool = False  # a piece that is a token is taken whole, whatever its merges; and BOS begins a text


_ENDINGS, _SPACES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (  # of any script, an upper case letter begins a new one
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_TEKKEN = _WORDS % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_GPT4O = _WORDS % (f"{_ENDINGS}?", f"{_ENDINGS}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
SPLITTERS = {  # pre-tokenizers known here; the first of those that are alike is written
    "gpt-2": Splitter(),
    # llama.cpp leaves the normalizing out: texts that NFC changes get other tokens there
    "olmo": Splitter("NFC"),
    "smollm": Splitter(digits=True),
    "command-r": Splitter("NFC", digits=True),
    "llama-bpe": Splitter(pattern=_LLAMA3, whole=True),
    "qwen2": Splitter("NFC", pattern=_QWEN2),
    "qwen35": Splitter("NFC", pattern=_QWEN35),
    "tekken": Splitter(pattern=_TEKKEN, whole=True),
    "gpt-4o": Splitter(pattern=_GPT4O),
}
SPLITTERS |= dict.fromkeys(("phi-2", "jais"), SPLITTERS["gpt-2"])
SPLITTERS |= dict.fromkeys(("mpt",), SPLITTERS["olmo"])
SPLITTERS |= dict.fromkeys(("starcoder", "refact"), SPLITTERS["smollm"])
SPLITTERS |= dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"), SPLITTERS["llama-bpe"])
SPLITTERS |= dict.fromkeys(("dbrx", "smaug-bpe"), Splitter(pattern=_LLAMA3))
SPLITTERS |= dict.fromkeys(("deepseek-r1-qwen", "megrez"), Splitter(pattern=_QWEN2))
SPLITTERS |= dict.fromkeys(("llama4",), SPLITTERS["gpt-4o"])


def metadata(tokenizer: Any, size: int) -> dict[str, Any]:
    """The file's `tokenizer.*` entries of a fast tokenizer; of `size` ids, those without a token are filled as unused.

    HarnessError where the tokenizer is of a kind that GGUF has, but llama.cpp would split text otherwise than it does.
    """
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    entries: dict[str, Any]
    if whole["model"]["type"] != "BPE":
        entries = {"tokenizer.ggml.model": "none", WHOLE: tokenizer.backend_tokenizer.to_str()}
    else:
        words, kinds = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
        for word, number in tokenizer.get_vocab().items():
            if number >= size:
                raise HarnessError(
                    f"the tokenizer's token {number} ({word!r}) has no row among the {size} of the embedding"
                )
            words[number], kinds[number] = word, NORMAL
        for added in whole["added_tokens"]:
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        entries = {"tokenizer.ggml.tokens": words, "tokenizer.ggml.token_type": kinds}
        entries |= _sentencepiece(whole, words, kinds) if whole["model"]["byte_fallback"] else _byte_level(whole)
        first = tokenizer("a").input_ids[:1]
        entries["tokenizer.ggml.add_bos_token"] = bool(first) and first[0] == tokenizer.bos_token_id
        entries["tokenizer.ggml.add_eos_token"] = False
    for name, key in TOKENS.items():
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            entries[key] = int(number)
    if tokenizer.chat_template:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _byte_level(whole: Mapping[str, Any]) -> dict[str, Any]:
    steps = _steps(whole["pre_tokenizer"], "pretokenizers")
    normalizer = (whole["normalizer"] or {}).get("type", "")
    found = _splitter(steps, normalizer, bool(whole["model"].get("ignore_merges")))
    for name, splitter in SPLITTERS.items():
        if found == splitter:
            merges = [" ".join(merge) for merge in whole["model"]["merges"]]
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}
    kinds = [step["type"] for step in steps]
    raise HarnessError(
        f"no GGUF is written for this tokenizer: it splits text by {kinds} (normalizer {normalizer or 'none'}), and "
        f"known are those of {', '.join(SPLITTERS)}"
    )


def _splitter(steps: Sequence[Mapping[str, Any]], normalizer: str, whole: bool) -> Splitter | None:
    """How the steps of a tokenizer.json cut text; None where they are of another form."""
    *first, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    regular = last.get("use_regex", True)  # whether GPT-2's expression is the last cut
    if not first and regular:
        return Splitter(normalizer, whole=whole)
    if len(first) != 1:
        return None
    if first[0]["type"] == "Digits" and first[0]["individual_digits"] and regular:
        return Splitter(normalizer, digits=True, whole=whole)
    plain = first[0]["type"] == "Split" and first[0]["behavior"] == "Isolated" and not first[0]["invert"]
    if plain and not regular and "Regex" in first[0]["pattern"]:
        return Splitter(normalizer, pattern=first[0]["pattern"]["Regex"], whole=whole)
    return None


def _steps(entry: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if entry is None:
        return []
    return list(entry[inside]) if entry["type"] == "Sequence" else [entry]


def _sentencepiece(whole: Mapping[str, Any], words: list[str], kinds: list[int]) -> dict[str, Any]:
    """Scores stand for the order in which merges are made; a vocabulary that they do not describe is refused."""
    merges = [tuple(merge) for merge in whole["model"]["merges"]]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    scores = [-float(ranks.get(word, 0)) for word in words]
    for index, word in enumerate(words):
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[index] = BYTE
        elif word == whole["model"]["unk_token"]:
            kinds[index] = UNKNOWN
    if set(merges) != set(sentencepiece_merges(words, scores, kinds)):
        raise HarnessError(
            "no GGUF is written for this tokenizer: its merges are not those of a SentencePiece vocabulary, so that "
            "llama.cpp would make other tokens of them"
        )
    steps = [step["type"] for step in _steps(whole["normalizer"], "normalizers")]
    spaces = _steps(whole["pre_tokenizer"], "pretokenizers")
    prefix = "Prepend" in steps or any(
        step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in spaces
    )
    if not ("Replace" in steps or [step["type"] for step in spaces] == ["Metaspace"]):
        raise HarnessError("no GGUF is written for this tokenizer: it has byte fallback, but does not mark blanks")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def sentencepiece_merges(words: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a third, the best-scored result first: what a SentencePiece BPE stands for."""
    numbers = {word: index for index, word in enumerate(words) if kinds[index] == NORMAL}
    merges = [
        (-scores[number], numbers[word[:cut]], numbers[word[cut:]])
        for word, number in numbers.items()
        for cut in range(1, len(word))
        if word[:cut] in numbers and word[cut:] in numbers
    ]
    return [(words[left], words[right]) for _, left, right in sorted(merges)]


def convert(path: Path, facts: Mapping[str, Any], destination: Path) -> None:
    """Write tokenizer.json and its companions for a GGUF file with these entries, by transformers where it must.

    BadFile where nothing here says how the tokenizer cuts text.
    """
    if is_known(facts):
        write(facts, destination)
        return
    if facts.get("tokenizer.ggml.model") == "gpt2":
        stated = facts.get("tokenizer.ggml.pre")
        how = f"cuts text as '{stated!s:.40}'" if stated else "does not say how it cuts text (tokenizer.ggml.pre)"
        raise BadFile(f"{path}: its tokenizer {how}; known are {', '.join(SPLITTERS)}: name the model's own folder")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(destination)


def _cut(facts: Mapping[str, Any]) -> Splitter | None:
    """The splitter of a byte-level tokenizer. GPT-2's own files are older than the key."""
    usual = "gpt-2" if facts.get("general.architecture") == "gpt2" else ""
    return SPLITTERS.get(str(facts.get("tokenizer.ggml.pre", usual)))


def is_known(facts: Mapping[str, Any]) -> bool:
    """Whether `write` rebuilds the tokenizer of a file with these entries."""
    if WHOLE in facts:
        return True
    if facts.get("tokenizer.ggml.model") == "llama":
        return "tokenizer.ggml.scores" in facts and facts.get("tokenizer.ggml.pre", "default") == "default"
    return facts.get("tokenizer.ggml.model") == "gpt2" and _cut(facts) is not None


def write(facts: Mapping[str, Any], destination: Path) -> None:
    """Write tokenizer.json and its companions from a file's entries, as `is_known` allows."""
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    begins = False  # what llama.cpp does where a file does not say whether BOS is added
    if WHOLE in facts:
        core = Tokenizer.from_str(facts[WHOLE])
        words = {number: word for word, number in core.get_vocab().items()}
    else:
        core = _core(facts)
        cut = _cut(facts)
        begins = facts["tokenizer.ggml.model"] == "llama" or (cut is not None and cut.whole)
        words = dict(enumerate(facts["tokenizer.ggml.tokens"]))
        for number, kind in enumerate(facts.get("tokenizer.ggml.token_type", [])):
            if kind in (CONTROL, UNKNOWN):
                core.add_special_tokens([AddedToken(words[number], normalized=False)])
            elif kind == USER_DEFINED:
                core.add_tokens([AddedToken(words[number])])
    bos, eos = facts.get(TOKENS["bos"]), facts.get(TOKENS["eos"])
    first = [bos] if facts.get("tokenizer.ggml.add_bos_token", begins) and bos is not None else []
    last = [eos] if facts.get("tokenizer.ggml.add_eos_token") and eos is not None else []
    if first or last:
        before, after = ([words[number] for number in side] for side in (first, last))
        core.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B", *after],
            special_tokens=[(words[number], number) for number in {*first, *last}],
        )
    specials = {f"{name}_token": words[facts[key]] for name, key in TOKENS.items() if key in facts}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **specials)
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    tokenizer.save_pretrained(destination)


def _core(facts: Mapping[str, Any]) -> Any:
    """The tokenizer of a file's own kinds, without its special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = facts["tokenizer.ggml.tokens"]
    vocabulary = {word: number for number, word in enumerate(words)}
    steps: list[Any]
    if facts["tokenizer.ggml.model"] == "gpt2":
        cut = _cut(facts) or Splitter()
        pairs = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
        core = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut.whole))
        if cut.normalizer:
            core.normalizer = normalizers.NFC()
        steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
        steps += [pre_tokenizers.Split(Regex(cut.pattern), "isolated")] if cut.pattern else []
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.pattern))
        core.pre_tokenizer = pre_tokenizers.Sequence(steps)
        core.decoder = decoders.ByteLevel()
        return core
    kinds = facts["tokenizer.ggml.token_type"]
    merges = sentencepiece_merges(words, facts["tokenizer.ggml.scores"], kinds)
    unknown = words[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = facts.get("tokenizer.ggml.add_space_prefix", True)
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core
