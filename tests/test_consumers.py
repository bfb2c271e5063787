"""What loads the output, and what others make of the input.

Real architectures are made with transformers, quantized, converted and loaded again; whole
repositories with the libraries that write them: pipelines of diffusers, dense layers of
sentence-transformers, adapters of peft. Those need the marker (llama.cpp also LLAMA_CPP, the folder
of its sources):

    pip install diffusers fastsafetensors gguf "mlx[cpu]" mlx-lm peft sentence-transformers
    LLAMA_CPP=FOLDER python -m pytest -n 2 -m consumers tests/test_consumers.py

And each program's own dequantization is held against the converter's: compressed-tensors multiplies
in the dtype of the scale. The product of a code's 4 significant bits with a BF16 scale's 8 is
rounded once to BF16 there as here, so the two agree to the last bit; with F32 scales both round the
float32 product.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    FineGrainedFP8Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from checkpoints import (
    FP8_CONFIG,
    assert_same_bits,
    canonical,
    dequantized,
    edit_json,
    finite_codes,
    load_checkpoint,
    packed,
    rand,
    write_checkpoint,
)
from fp8_cast_bf16 import main
from make_checkpoint import quantize_per_block

SMALL = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "deepseek_v3": DeepseekV3Config(
        **SMALL,
        moe_intermediate_size=144,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=96,
        kv_lora_rank=140,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=40),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, head_dim=40, moe_intermediate_size=144, num_experts=4, num_experts_per_tok=2
    ),
}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
BF16 = torch.bfloat16

# --- what loads the output ---


def tiny_qwen3(**sizes):
    """Return a Qwen3 with random weights in BF16."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=200, hidden_size=256, head_dim=64, **sizes)
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    return AutoModelForCausalLM.from_config(config, dtype=BF16)


def quantize(tensors: dict, scale_dtype: torch.dtype) -> tuple[dict, dict]:
    """Return the FP8 form of a model's projection weights and what they must come back as."""
    given, expected = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            given[name] = expected[name] = tensor
            continue
        codes, scales = quantize_per_block(tensor.float())
        given[name], given[name + "_scale_inv"] = codes, scales.to(scale_dtype)
        expected[name] = dequantized(codes, given[name + "_scale_inv"])
    return given, expected


def quantized_model(folder, shards):
    """Write a small Qwen3 in FP8, in so many shards without an index; return what comes out."""
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"], dtype=torch.bfloat16)
    model.save_pretrained(folder / "master")
    config = json.loads((folder / "master/config.json").read_text())
    given, expected = quantize(load_checkpoint(folder / "master"), torch.float32)
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    parts = {name: dict([*given.items()][i::shards]) for i, name in enumerate(names)}
    config["quantization_config"] = FP8_CONFIG
    write_checkpoint(folder / "fp8", parts, config, index=False)
    return expected


def assert_loads(folder, expected):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert_same_bits(tensor, expected[name])


def test_shards_without_an_index_load_after_conversion(tmp_path):
    expected = quantized_model(tmp_path, 2)
    main(tmp_path / "fp8", tmp_path / "bf16")
    assert_loads(tmp_path / "bf16", expected)


def test_a_model_and_its_draft_in_a_folder_load_after_conversion(tmp_path):
    root = quantized_model(tmp_path / "a", 2)
    draft = quantized_model(tmp_path / "b", 1)
    # Another architecture's names, or the draft would be the same weights again.
    (tmp_path / "b/fp8").rename(tmp_path / "a/fp8/draft")
    shard = tmp_path / "a/fp8/draft/model.safetensors"
    given = load_checkpoint(shard.parent)
    drop = re.compile(r"model\.layers\.[12]\.")
    save_file({name: t for name, t in given.items() if not drop.match(name)}, shard,
              metadata={"format": "pt"})
    config = json.loads((shard.parent / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": config["layer_types"][:1]}
    (shard.parent / "config.json").write_text(json.dumps(config))
    main(tmp_path / "a/fp8", tmp_path / "bf16")
    assert_loads(tmp_path / "bf16", root)
    assert_loads(tmp_path / "bf16/draft", {n: t for n, t in draft.items() if not drop.match(n)})


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_converted_model_loads_and_computes_the_same_logits(tmp_path, name, scale_dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "master")
    config = json.loads((tmp_path / "master/config.json").read_text())
    given, expected = quantize(load_checkpoint(tmp_path / "master"), scale_dtype)
    assert len(given) - len(expected) > 15
    # every third tensor into the same shard, so that scales come to stand apart from their weights
    shards = {f"model-{i:05}-of-00003.safetensors": {} for i in range(3)}
    for number, (tensor_name, tensor) in enumerate(given.items()):
        shards[list(shards)[number % 3]][tensor_name] = tensor
    write_checkpoint(tmp_path / "fp8", shards, {**config, "quantization_config": FP8_CONFIG})
    write_checkpoint(tmp_path / "expected", {"model.safetensors": expected}, config, index=False)

    main(tmp_path / "fp8", tmp_path / "bf16")

    for tensor_name, tensor in load_checkpoint(tmp_path / "bf16").items():
        assert_same_bits(tensor, expected[tensor_name])
    converted, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "bf16", output_loading_info=True
    )
    assert not any(info.values()), info
    assert converted.dtype == torch.bfloat16
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "expected", dtype=torch.bfloat16)
    tokens = torch.arange(24).view(2, 12) * 7 % 300
    with torch.no_grad():
        logits, expected_logits = converted(tokens).logits, reference(tokens).logits
    assert_same_bits(canonical(logits), canonical(expected_logits))
    assert logits.std() > 0


TOKENS = torch.arange(24).view(2, 12) * 7 % 200


def quantize_saved(folder: Path, block: int = 128) -> dict[str, torch.Tensor]:
    """Quantize the matrices in the layers of a saved model, in place, under a config that says so.

    Where there are several shards, scales stand in the one after their weight's. Returns what the
    weights must come back as.
    """
    shards = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    given, expected = {path: {} for path in shards}, {}
    for number, (path, tensors) in enumerate(shards.items()):
        beside = list(shards)[(number + 1) % len(shards)]
        for name, tensor in tensors.items():
            given[path][name] = tensor
            if "layers." in name and tensor.ndim == 2:
                codes, scales = quantize_per_block(tensor.float(), block)
                given[path][name], given[beside][name + "_scale_inv"] = codes, scales
                expected[name] = dequantized(codes, scales, (block, block))
    assert expected
    for path, tensors in given.items():
        save_file(tensors, path, metadata={"format": "pt"})
    weight_map = {name: path.name for path, tensors in given.items() for name in tensors}
    for path in folder.glob("*.index.json"):
        edit_json(path, lambda index: index.update(weight_map=weight_map))
    more = {"quantization_config": {**FP8_CONFIG, "weight_block_size": [block, block]}}
    edit_json(folder / "config.json", lambda config: config.update(more))
    return expected


def replace_weights(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Replace weights of a model in memory: what it then computes is what the output must."""
    state = model.eval().state_dict()
    for name, value in values.items():
        state[name].copy_(value)


def saved_qwen3(folder: Path, **sizes):
    """Save a Qwen3 in several shards, in FP8; return it with the weights that must come out."""
    model = tiny_qwen3(intermediate_size=200, **{"num_hidden_layers": 3, **sizes})
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    replace_weights(model, quantize_saved(folder))
    return model


def words_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ..."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, 200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def assert_same_logits(model, reference) -> None:
    with torch.no_grad():
        got, expected = model(TOKENS).logits, reference(TOKENS).logits
    assert_same_bits(got, expected)
    assert got.std() > 0


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_dispatches_the_shards(tmp_path, place):
    reference = saved_qwen3(tmp_path / "in")
    main(tmp_path / "in", tmp_path / "out")
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(reference.config, dtype=BF16).eval()
    devices = {"": "cpu"}
    if place == "disk":
        devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        devices |= {"model.layers": "disk", "lm_head": "cpu"}
    model = load_checkpoint_and_dispatch(
        model, tmp_path / "out", devices, offload_folder=tmp_path / "offload", strict=True
    )
    assert_same_logits(model, reference)


def test_draft_model_in_a_folder_loads_and_drafts(tmp_path):
    """The draft has a config of its own, with other blocks than the model's."""
    reference = saved_qwen3(tmp_path / "in")
    draft = tiny_qwen3(intermediate_size=200, num_hidden_layers=1)
    draft.save_pretrained(tmp_path / "in/dspark")
    replace_weights(draft, quantize_saved(tmp_path / "in/dspark", block=64))

    main(tmp_path / "in", tmp_path / "out")

    loaded = {}
    for folder, expected in (("out", reference), ("out/dspark", draft)):
        loaded[folder], info = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values()), info
        assert_same_logits(loaded[folder], expected)
    got, expected = (
        model.generate(
            TOKENS[:1],
            attention_mask=torch.ones_like(TOKENS[:1]),
            assistant_model=assistant,
            max_new_tokens=8,
            do_sample=False,
        )
        for model, assistant in ((loaded["out"], loaded["out/dspark"]), (reference, draft))
    )
    assert got.tolist() == expected.tolist()


def test_draft_model_of_the_same_names_is_no_copy_of_the_model(tmp_path):
    """It has all the names of the model's first layers, and other shapes."""
    saved_qwen3(tmp_path / "in")
    draft = tiny_qwen3(intermediate_size=96, num_hidden_layers=2)
    draft.save_pretrained(tmp_path / "in/draft")
    replace_weights(draft, quantize_saved(tmp_path / "in/draft"))
    main(tmp_path / "in", tmp_path / "out")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/draft"), draft)


def test_plain_draft_model_keeps_its_dtype(tmp_path):
    saved_qwen3(tmp_path / "in")
    draft = tiny_qwen3(intermediate_size=200, num_hidden_layers=1).float().eval()
    draft.save_pretrained(tmp_path / "in/draft")
    main(tmp_path / "in", tmp_path / "out")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/draft"), draft)


def test_adapter_beside_a_single_shard_gets_into_no_index(tmp_path):
    tiny_qwen3(intermediate_size=200, num_hidden_layers=1).save_pretrained(tmp_path / "in")
    quantize_saved(tmp_path / "in")
    adapter = {"base_model.model.lm_head.lora_A.weight": torch.ones(8, 256)}
    save_file(adapter, tmp_path / "in/adapter_model.safetensors")
    main(tmp_path / "in", tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.index.json")]
    copied = load_file(tmp_path / "out/adapter_model.safetensors")
    assert_same_bits(*copied.values(), *adapter.values())


@pytest.mark.consumers
def test_peft_adapter_beside_the_shards_loads_with_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = saved_qwen3(tmp_path / "in")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    reference = peft.get_peft_model(model, config).eval()
    reference.save_pretrained(tmp_path / "in")
    adapter = load_file(tmp_path / "in/adapter_model.safetensors")
    for parameter in reference.parameters():  # saved in F32, and cast by transformers on loading
        parameter.data = parameter.to(BF16)

    main(tmp_path / "in", tmp_path / "out")

    copied = load_file(tmp_path / "out/adapter_model.safetensors")
    assert copied.keys() == adapter.keys()
    for name, tensor in copied.items():
        assert_same_bits(tensor, adapter[name])
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same_logits(loaded, reference)
    with reference.disable_adapter(), pytest.raises(AssertionError, match="element"):
        assert_same_logits(loaded, reference)


@pytest.mark.consumers
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_diffusers_pipeline_with_a_part_in_fp8(tmp_path, part):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16,
        dim=256,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=256,
        axes_dims=[16, 24, 24],
        axes_lens=[64, 64, 64],
    )
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32,), latent_channels=16, shift_factor=0.1
        ).to(BF16),
        text_encoder=tiny_qwen3(intermediate_size=200, num_hidden_layers=2).model,
        tokenizer=words_tokenizer(),
        transformer=transformer.to(BF16),
    )
    pipeline.save_pretrained(tmp_path / "in", max_shard_size="700KB")
    assert len([*(tmp_path / "in" / part).glob("*.safetensors")]) > 1
    replace_weights(getattr(pipeline, part), quantize_saved(tmp_path / "in" / part))

    main(tmp_path / "in", tmp_path / "out")

    loaded = diffusers.ZImagePipeline.from_pretrained(tmp_path / "out", dtype=BF16)
    images = []
    for each in (loaded, pipeline):
        each.set_progress_bar_config(disable=True)
        result = each(
            "w5 w17 w120",
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=0,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        images.append(result.images)
    assert_same_bits(*images)
    assert images[0].std() > 0


@pytest.mark.consumers
def test_sentence_transformers_with_a_dense_layer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    model = tiny_qwen3(intermediate_size=200, num_hidden_layers=2).model
    model.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    transformer = modules.Transformer(str(tmp_path / "model"))
    reference = library.SentenceTransformer(
        modules=[
            transformer,
            modules.Pooling(256, pooling_mode="lasttoken"),
            modules.Dense(256, 64),
            modules.Normalize(),
        ],
        device="cpu",
    )
    reference.save(str(tmp_path / "in"))
    replace_weights(transformer.auto_model, quantize_saved(tmp_path / "in"))

    main(tmp_path / "in", tmp_path / "out")

    got = load_file(tmp_path / "out/2_Dense/model.safetensors")
    for name, tensor in load_file(tmp_path / "in/2_Dense/model.safetensors").items():
        assert_same_bits(got[name], tensor)
    loaded = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    sentences = ["w3 w4 w5", "w100", "w7 w7 w199 w20"]
    embeddings = [each.encode(sentences, convert_to_tensor=True) for each in (loaded, reference)]
    assert embeddings[0].shape == (3, 64)
    assert_same_bits(*embeddings)


@pytest.mark.consumers
def test_fastsafetensors_reads_the_shards(tmp_path):
    library = pytest.importorskip("fastsafetensors")
    reference = saved_qwen3(tmp_path / "in")
    main(tmp_path / "in", tmp_path / "out")
    paths = sorted(map(str, (tmp_path / "out").glob("*.safetensors")))
    with library.fastsafe_open(paths, device="cpu", nogds=True) as shards:
        got = {name: shards.get_tensor(name).clone() for name in shards.keys()}  # noqa: SIM118
    expected = reference.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert_same_bits(tensor, expected[name])


@pytest.mark.consumers
def test_mlx_lm_loads_and_computes_the_same_logits(tmp_path):
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    from mlx.utils import tree_flatten

    reference = saved_qwen3(tmp_path / "in")
    main(tmp_path / "in", tmp_path / "out")
    reference.save_pretrained(tmp_path / "reference")
    expected, logits = reference.state_dict(), []
    for folder in ("out", "reference"):
        model, _ = mlx_lm.load_model(tmp_path / folder)
        weights = dict(tree_flatten(model.parameters()))
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            bits = torch.tensor(weight.view(mx.int16).tolist(), dtype=torch.int16)
            assert_same_bits(bits.view(BF16), expected[name])
        logits.append(torch.tensor(model(mx.array(TOKENS.tolist())).astype(mx.float32).tolist()))
    assert_same_bits(*logits)
    assert logits[0].std() > 0


@pytest.mark.consumers
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs LLAMA_CPP, llama.cpp's folder")
def test_llama_cpp_converts_the_output(tmp_path):
    """To the same bits as the output's, and as what it makes of the FP8 checkpoint by itself."""
    gguf = pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = saved_qwen3(tmp_path / "in")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"w{number}" for number in range(200)),
        model_prefix=str(tmp_path / "in/tokenizer"),
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    main(tmp_path / "in", tmp_path / "out")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    expected = {
        names.get_name(name, (".weight",)): tensor
        for name, tensor in reference.state_dict().items()
    }
    script = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    for folder in ("out", "in"):
        path = tmp_path / f"{folder}.gguf"
        command = [script, tmp_path / folder, "--outfile", path, "--outtype", "bf16"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            wanted = expected[name] if expected[name].ndim > 1 else expected[name].float()
            kind = "BF16" if wanted.dtype == BF16 else "F32"
            assert (tensor.tensor_type.name, [*tensor.shape]) == (kind, [*wanted.shape][::-1])
            assert tensor.data.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


# --- what others make of the input ---


def exponent_bytes(*shape):
    return torch.randint(100, 140, shape, dtype=torch.uint8)


SCHEMES = {
    "tensor": ("float-quantized", {**FP8, "strategy": "tensor"}, rand(1, dtype=BF16)),
    "channel": ("float-quantized", {**FP8, "strategy": "channel"}, rand(256, 1, dtype=BF16)),
    "channel-f32": ("float-quantized", {**FP8, "strategy": "channel"}, rand(256, 1)),
    "group": (
        "float-quantized",
        {**FP8, "strategy": "group", "group_size": 64},
        rand(256, 4, dtype=BF16),
    ),
    "block": (
        "float-quantized",
        {**FP8, "strategy": "block", "block_structure": [128, 128]},
        rand(2, 2),
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        exponent_bytes(256, 8),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
        exponent_bytes(256, 8),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {**FP4, "scale_dtype": torch.float8_e4m3fn},
        finite_codes(256, 16).abs(),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decompresses_to_the_same_bits(tmp_path, name):
    format_name, arguments, scale = SCHEMES[name]
    if name in ("mxfp4", "nvfp4"):
        given = {"weight_packed": packed(256, 128), "weight_scale": scale}
    else:
        given = {"weight": finite_codes(256, 256), "weight_scale": scale}
    if name == "nvfp4":
        given["weight_global_scale"] = torch.tensor([613.0])
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(format_name)
    theirs = compressor.decompress(dict(given), scheme)["weight"].to(BF16)
    groups = {"group_0": scheme.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    tensors = {f"m.{key}": tensor for key, tensor in given.items()}
    write_checkpoint(
        tmp_path / "in", {"model.safetensors": tensors}, {"quantization_config": config}
    )
    main(tmp_path / "in", tmp_path / "out")
    assert_same_bits(load_checkpoint(tmp_path / "out")["m.weight"], canonical(theirs))


def assert_loads_like(fp8, bf16):
    """Compare what transformers makes of the FP8 checkpoint itself with what it loads of ours."""
    dequantize = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=dequantize)
    ours, info = AutoModelForCausalLM.from_pretrained(bf16, output_loading_info=True)
    assert not any(info.values()), info
    assert ours.dtype == BF16
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in ours.items():
        if "norm" in name:  # DeepSeek-V4's norms are widened, but not under a quantization
            tensor = tensor.to(theirs[name].dtype)
        assert_same_bits(tensor, theirs[name])


def save_quantized(folder, model, config, quantize):
    """Save a model, and beside it the same with each tensor as `quantize` returns it."""
    model.save_pretrained(folder / "master")
    given = {}
    for name, tensor in load_checkpoint(folder / "master").items():
        given |= quantize(name, tensor) or {name: tensor}
    saved = json.loads((folder / "master/config.json").read_text())
    write_checkpoint(folder / "fp8", {"model.safetensors": given}, {**saved, **config}, index=False)
    main(folder / "fp8", folder / "bf16")


def test_transformers_dequantizes_qwen3_to_the_same_bits(tmp_path):
    # whole blocks only: transformers computes the block from the shapes, which is wrong for ragged
    model = tiny_qwen3(intermediate_size=384, num_hidden_layers=2)

    def quantize(name, tensor):
        if name.endswith("_proj.weight"):
            codes, scale = quantize_per_block(tensor.float())
            return {name: codes, name + "_scale_inv": scale.bfloat16()}

    save_quantized(tmp_path, model, {"quantization_config": FP8_CONFIG}, quantize)
    assert_loads_like(tmp_path / "fp8", tmp_path / "bf16")


def test_transformers_dequantizes_deepseek_v4_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    small = {"vocab_size": 256, "hidden_size": 256, "moe_intermediate_size": 128, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "index_n_heads": 2, "o_groups": 2}
    ranks = {"q_lora_rank": 128, "o_lora_rank": 64, "index_head_dim": 64, "index_topk": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "hc_mult": 2}
    config = DeepseekV4Config(
        **small, **heads, **ranks, **experts, num_hidden_layers=4, sliding_window=16
    )

    def quantize(name, tensor):
        """FP4 routed experts in I8, FP8 attention and shared experts, E8M0 scales, as released."""
        scale = name.removesuffix("weight") + "scale"
        if ".ffn.experts." in name:
            codes = torch.randint(0, 256, (tensor.shape[0], tensor.shape[1] // 2)).to(torch.uint8)
            exponents = torch.randint(118, 124, (tensor.shape[0], tensor.shape[1] // 32))
        elif any(part in name for part in (".wq_", ".wo_", ".shared_experts.")):
            codes = (torch.randn(tensor.shape) * 100).to(torch.float8_e4m3fn)
            exponents = torch.randint(115, 119, (tensor.shape[0] // 128, tensor.shape[1] // 128))
        else:
            return None
        codes = codes.view(torch.int8) if codes.dtype == torch.uint8 else codes
        return {name: codes, scale: exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}

    model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    quantization = {**FP8_CONFIG, "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    extra = {"expert_dtype": "fp4", "quantization_config": quantization}
    save_quantized(tmp_path, model, extra, quantize)
    assert "expert_dtype" not in (tmp_path / "bf16/config.json").read_text()
    assert_loads_like(tmp_path / "fp8", tmp_path / "bf16")


def test_transformers_is_wrong_where_the_last_block_is_cut_off(tmp_path):
    """192 rows over 2 rows of scales: blocks of 128 by the format, of 96 in transformers 5.23.

    It divides the rows by the rows of scales, where the format fixes the block and cuts the last.
    """
    model = tiny_qwen3(intermediate_size=192, num_hidden_layers=1)
    expected, computed = {}, {}

    def quantize(name, tensor):
        if name.endswith("up_proj.weight"):
            codes, scale = quantize_per_block(tensor.float())
            for rows, values in ((128, expected), (96, computed)):
                wide = scale.repeat_interleave(rows, 0).repeat_interleave(128, 1)[:192]
                values[name] = (codes.float() * wide).bfloat16()
            return {name: codes, name + "_scale_inv": scale}

    save_quantized(tmp_path, model, {"quantization_config": FP8_CONFIG}, quantize)
    ours = load_checkpoint(tmp_path / "bf16")
    dequantize = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=dequantize
    ).state_dict()
    assert expected
    for name, tensor in expected.items():
        assert_same_bits(ours[name], tensor)
        assert not torch.equal(expected[name], computed[name])
        # a transformers that has mended this computes what we do
        assert any(torch.equal(theirs[name], values[name]) for values in (expected, computed))
