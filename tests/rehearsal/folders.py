"""What the loopback Hub serves: one-layer models of the true widths, and a made-up text under WikiText-2's name.

Widths, heads and contexts are those of `architectures`; layers are one, and the vocabulary is a fiftieth, so
that the head does not take most of the time. Weights are random from fixed seeds, text comes from a few lists of words.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from harness.inputs.hub import parse_text
from harness.inputs.models import names as models
from harness.inputs.models.names import ARCHITECTURES
from harness.inputs.texts import corpora
from tests.rehearsal.hub import Hub, Repository

SEED = 20_261_204
COMMIT = "5eed" * 10  # of every model
# odd, as gpt2's own is: no multiple of a block
VOCABULARY = {"gpt2": 1047, "olmo-1b": 1048, "phi-3-mini": 1064}
LAYERS = {"gpt2": "n_layer", "olmo-1b": "num_hidden_layers", "phi-3-mini": "num_hidden_layers"}
WORDS = {
    "who": "the miller|an old captain|her sister|the committee|a grey heron|my neighbour|the second engineer".split(
        "|"
    ),
    "does": "watched|repaired|forgot|described|painted|carried away|never mentioned".split("|"),
    "what": "the broken clock|two letters|a field of barley|the northern road|every lantern|that bridge".split("|"),
    "when": "before dawn|in 1871|during the long winter|after the second flood|on market days|once again".split("|"),
}
PAGES = 24  # of the made-up text
SENTENCES = 12  # a paragraph


def sentence(draw: random.Random) -> str:
    """One sentence in WikiText's spelling: punctuation stands apart."""
    who, does, what, when = (draw.choice(WORDS[part]) for part in ("who", "does", "what", "when"))
    return f"{when} , {who} {does} {what} ." if draw.random() < 0.5 else f"{who} {does} {what} {when} ."


def rows() -> list[str]:
    """Rows as WikiText-2's are laid out: empty ones, ' = Title = ' lines, and paragraphs, each with its line feed."""
    draw = random.Random(SEED)
    found: list[str] = []
    for page in range(PAGES):
        found += ["", f" = Page {page} = \n", ""]
        for part in ("Early years", "Later"):
            found += [f" = = {part} = = \n", ""]
            found += [" " + " ".join(sentence(draw) for _ in range(SENTENCES)) + " \n" for _ in range(2)]
    return found


def tokenizer(name: str) -> Any:
    """A tokenizer of the model's kind over the made-up text: byte-level, Phi-3's with a BOS before the text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    led = name == "phi-3-mini"
    specials = ["<unk>", "<s>", "<|endoftext|>"] if led else ["<|endoftext|>"]
    bytelevel = Tokenizer(kinds.BPE())
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytelevel.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY[name],
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytelevel.train_from_iterator(rows(), trainer)
    if led:
        bytelevel.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytelevel, bos_token=specials[-2] if led else specials[-1], eos_token=specials[-1]
    )


def model(name: str, folder: Path) -> None:
    """Write a one-layer model of the named one's widths: config.json, model.safetensors and the tokenizer's files."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer(name)
    facts = {
        **ARCHITECTURES[name],
        LAYERS[name]: 1,
        "vocab_size": VOCABULARY[name],
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.eos_token_id,
    }
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        made: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts), dtype=torch.float32)
    made.save_pretrained(folder)
    words.save_pretrained(folder)


def text(folder: Path) -> None:
    """Write the made-up text as the dataset's parquet file of the split `test`, with the card that names it."""
    from datasets import Dataset

    asked = parse_text(corpora.WIKITEXT_2)
    files = {"split": asked.split, "path": f"{asked.config}/{asked.split}-*"}
    card = {"configs": [{"config_name": asked.config, "data_files": [files]}]}
    place = f"{asked.config}/{asked.split}-00000-of-00001.parquet"
    (folder / place).parent.mkdir(parents=True)
    (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n\nMade-up text.\n")
    Dataset.from_dict({"text": rows()}).to_parquet(folder / place)


def stock(hub: Hub, folder: Path, *names: str) -> None:
    """Put the named models, and the text, on the Hub under the names that the harness asks for."""
    for name in names:
        if not (folder / name).is_dir():
            model(name, folder / name)
        source = models.KNOWN[name].removeprefix("hub:")
        hub.repositories["models"][source] = Repository.of(folder / name, COMMIT)
    asked = parse_text(corpora.WIKITEXT_2)
    if not (folder / "text").is_dir():
        text(folder / "text")
    hub.repositories["datasets"][asked.repository] = Repository.of(folder / "text", asked.commit)
