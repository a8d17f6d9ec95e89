"""Models as pure functions, and checkpoints: `models.load("Qwen/Qwen3-0.6B")`, `models.save(folder, model)`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm.models.pretrained import Pretrained, load, save

__all__ = ["Pretrained", "load", "save"]


def __getattr__(name: str) -> Any:
    # On first use: a part of the package that needs no checkpoint does not wait for what reads them.
    if name in __all__:
        from jaxrl_llm.models import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
