"""Which targets the draft can borrow its layers from, and the versions of vLLM that this was seen to work with.

Imports nothing of vLLM, as an export asks it too.
"""

DRAFT_ARCHITECTURE = "PardecDraftForCausalLM"
TESTED_VERSIONS = ("0.32.0",)
# `model_type` of a configuration -> vLLM's class for it. All name their layers as transformers does, packed or not,
# and take input embeddings as the embedding layer gives them.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "granite": "GraniteForCausalLM",
}
