"""Random models on disk are what transformers loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tools import make_model

SIZES = ["--layers", "3", "--hidden", "32", "--intermediate", "48", "--heads", "4", "--kv-heads", "2", "--vocab", "300"]


def test_transformers_loads_it_whole(tmp_path: Path) -> None:
    make_model.main(["--out", str(tmp_path), *SIZES, "--dtype", "bfloat16"])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.config.num_hidden_layers == 3
    assert torch.all(model.model.norm.weight == 1)
    assert 0.01 < model.lm_head.weight.float().std() < 0.03
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer("Blood pressure 120/80, naïve", return_tensors="pt").input_ids
    assert tokenizer.decode(tokens[0]) == "Blood pressure 120/80, naïve"
    assert model(tokens).logits.isfinite().all()


def test_shards_stay_below_their_size_and_hold_the_same_values(tmp_path: Path) -> None:
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=300
    )
    for name, most in (("many", 20 << 10), ("one", 1 << 30)):
        make_model.make_model(tmp_path / name, config, torch.float32, most)
    shards = list((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    # The embedding and the head are larger than a shard, and stand alone.
    assert sum(path.stat().st_size > 24 << 10 for path in shards) == 2
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("many", "one"))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_the_tokenizer_can_be_copied(tmp_path: Path) -> None:
    make_model.main(["--out", str(tmp_path / "a"), *SIZES])
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"marked": 1}')
    make_model.main(["--out", str(tmp_path / "b"), *SIZES, "--tokenizer-from", str(tmp_path / "a")])
    assert (tmp_path / "b" / "tokenizer_config.json").read_text() == '{"marked": 1}'


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--vocab must be at least 259"):
        make_model.main(["--out", str(tmp_path), *SIZES[:-1], "100"])
