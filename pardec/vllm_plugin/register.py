"""The entry point of vLLM's general plugins: tells vLLM where the draft's architecture is found.

vLLM calls it in each of its processes, for everybody who has pardec installed, so nothing of vLLM is loaded or changed
before a draft of pardec is.
"""

from pardec.vllm_plugin.architectures import DRAFT_ARCHITECTURE


def register() -> None:
    """Registers the draft's architecture by name."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    ModelRegistry.register_model(DRAFT_ARCHITECTURE, f"pardec.vllm_plugin.draft_model:{DRAFT_ARCHITECTURE}")
