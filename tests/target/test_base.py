"""Loading a base: what its files lack is said, not made up."""

import pytest
from safetensors.torch import load_file, save_file

from pardec.target.base import load_base


def test_a_checkpoint_that_lacks_weights_is_refused_naming_them(tiny_base, tmp_path):
    """transformers fills in random numbers, and warns."""
    tiny_base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.3.mlp" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    words = r"expected all weights, found none for model\.layers\.3\.mlp\.down_proj\.weight and 2 more"
    with pytest.raises(ValueError, match=words):
        load_base(str(tmp_path))
