"""A causal language model of transformers, as comparisons and the bisection load it."""

from typing import Any

from isomoe.parity.targets.base import TargetError


def load_model(name: str, path: str, *, dtype: str, device: str) -> Any:
    """The model on its device, ready to be run.

    Args:
        name: the target's, for an error.
        path: a folder or a hub id.
        dtype: the torch dtype's name; "auto" is the checkpoint's.

    Raises:
        TargetError: if transformers is not installed, or cannot load it.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as hf_logging

        logging: Any = hf_logging
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # the stage shows one
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        finally:
            if shown:
                logging.enable_progress_bar()
        return model.to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TargetError(f"{name}: transformers cannot load it ({reason})") from None
