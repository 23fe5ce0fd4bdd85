"""Tiny random models of the rewards' kinds in folders from which ``from_pretrained`` loads; nothing is downloaded."""

import json
import string

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

from genkit.testing import tiny

LABELS = ("cat", "dog", "hen")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    """``(B, C, H, W)`` on [0, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def clip(folder, *, size: int = 32, patch: int = 16, projection: int = 16, length: int = 77) -> str:
    """A folder with a ``CLIPModel`` and its tokenizer, a token a character."""
    tokenizer = tiny.clip_tokenizer()
    common = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, dropout=0.5)
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = common | special | dict(vocab_size=len(tokenizer), max_position_embeddings=length, attention_dropout=0.5)
    vision = common | dict(image_size=size, patch_size=patch, attention_dropout=0.5)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))
    with torch.no_grad():
        for parameter in model.vision_model.parameters():  # born so small that all images would look alike
            parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bert_tokenizer(folder) -> str:
    """A folder with a tokenizer of BERT's form: [CLS] in front, [SEP] behind, a token a letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [c for c in string.printable if not c.isspace() and not c.isupper()]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *("##" + c for c in letters)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{t.strip('[]').lower()}_token": t for t in special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


PREPROCESSOR = dict(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=3)


def classifier(folder, **preprocessor) -> str:
    """A folder with a classifier of three classes and its preprocessing."""
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        hidden_dropout_prob=0.5,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor or PREPROCESSOR))
    return str(folder)
