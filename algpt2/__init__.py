"""ALGPT2: GPT-2 with ALBERT's shared blocks and factorized embedding.

`import algpt2` imports no framework; the public names load their module when first used. Each
module registers its classes with transformers' Auto classes as it is imported, so that

    import algpt2; algpt2.register()
    model = AutoModelForCausalLM.from_pretrained("runs/my-run/checkpoint-00001000")

knows the model type "algpt2". Using any name of the model (`from algpt2 import ALGPT2LMHeadModel`)
does the same; `ALGPT2Config` alone registers with `AutoConfig` only.
"""

import importlib

_MODULE_OF = {
    "ALGPT2Config": "configuration_algpt2",
    "ALGPT2PreTrainedModel": "modeling_algpt2",
    "ALGPT2Model": "modeling_algpt2",
    "ALGPT2LMHeadModel": "modeling_algpt2",
    "TFALGPT2LMHeadModel": "modeling_tf_algpt2",
}
__all__ = ["register", *(name for name in _MODULE_OF if not name.startswith("TF"))]


def register() -> None:
    """Make `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the model type "algpt2"."""
    importlib.import_module(".modeling_algpt2", __name__)


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
