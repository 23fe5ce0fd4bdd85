"""What a network's attention asks for that few backends have: soft caps, sinks, dropout."""

from genkit._diffusers import backend_function
from genkit.attention.coverage import AttentionModule, Coverage
from genkit.attention.probing import OURS

# Backends that Transformers has by itself. Its own handle padding and caches better than ours around the same kernels.
OF_TRANSFORMERS = {"flash": "flash_attention_2", "_flash_3": "flash_attention_3", "flex": "flex_attention"}
_CAPS, _SINKS = ("attn_logit_softcapping", "softcap"), ("sinks",)
_DROPOUTS = ("attention_dropout", "attn_dropout", "attn_drop", "dropout_p", "dropout_prob")


def refusal(name: str, records: Coverage) -> str | None:
    """Why a backend does not compute the attention of these modules as they are set, and what to do."""
    for record in records:
        if reason := lacking(name, record):
            return f"{record.name or record.kind} has {reason}"
        if (p := _dropout(record)) > 0 and not _drops(name, _own(name, record)):
            return (
                f"{record.name or record.kind} is in train mode with dropout={p:g} of attention; put the network into "
                "eval mode, set this dropout to 0, or take 'native'"
            )
    return None


def lacking(name: str, record: AttentionModule) -> str | None:
    """What a module's attention is made with that a backend has not, and what to do."""
    if record.way != "interface" or _own(name, record):
        return None
    for what, attributes in (("a soft cap", _CAPS), ("sinks", _SINKS)):
        if any(getattr(record.module, attribute, None) is not None for attribute in attributes):
            return (
                f"{what} of attention, for which Transformers has backends; take 'native' or 'flex' for this network "
                "(of a pipeline, choose for each network by itself)"
            )
    return None


def _own(name: str, record: AttentionModule) -> bool:
    return record.way == "interface" and (name == "native" or name in OF_TRANSFORMERS)


def _dropout(record: AttentionModule) -> float:
    """Of attention weights, as a module is set. Where Diffusers' networks have some (ACE-Step) is not in attributes."""
    if not record.module.training or record.way not in ("interface", "rerouted"):
        return 0.0
    # Elsewhere than in Transformers' attention this may be of what comes out of it.
    names = (*_DROPOUTS, "dropout") if record.way == "interface" else _DROPOUTS
    values = (getattr(record.module, name, None) for name in names)
    rates = (getattr(value, "p", value) for value in values)
    return max((float(rate) for rate in rates if isinstance(rate, (int, float))), default=0.0)


def _drops(name: str, own: bool) -> bool:
    if own:
        return name != "flex"
    return name != OURS and "dropout_p" in backend_function(name)[2]
