"""What loads the output, and what others make of the input.

Real architectures are made with transformers, quantized, converted and loaded again; whole
repositories with the libraries that write them (marked; the README says what to install): pipelines
of diffusers, dense layers of sentence-transformers, adapters of peft.

Each program's own dequantization is held against the converter's: compressed-tensors multiplies in
the dtype of the scale. The product of a code's 4 significant bits with a BF16 scale's 8 is rounded
once to BF16 there as here, so the two agree to the last bit; with F32 scales both round the float32
product.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import checkpoints as c
from checkpoints import FP8_CONFIG, SHARD, load_checkpoint, rand, write_checkpoint
from fp8_cast_bf16 import bf16_tensors, main
from make_checkpoint import quantize_per_block

SMALL = {
    "vocab_size": 300, "hidden_size": 160, "intermediate_size": 200, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
CONFIGS = {
    "deepseek_v3": transformers.DeepseekV3Config(
        **SMALL, moe_intermediate_size=144, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=96, kv_lora_rank=140,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=40),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SMALL, head_dim=40, moe_intermediate_size=144, num_experts=4, num_experts_per_tok=2)}
FP8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
BF16 = torch.bfloat16

# --- what loads the output ---


def tiny_qwen3(layers: int, intermediate: int = 200):
    """Return a Qwen3 with random weights in BF16."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=200, hidden_size=256, head_dim=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, intermediate_size=intermediate)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=BF16)


def convert(folder: Path) -> None:
    main(folder / "in", folder / "out")


def load(folder: Path):
    """Load a model with transformers, which must find neither too much nor too little."""
    loader = transformers.AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


TOKENS = torch.arange(24).view(2, 12) * 7 % 200


def quantize_saved(folder: Path, block: int = 128, scale_dtype=torch.float32) -> dict:
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
                scales = scales.to(scale_dtype)
                given[path][name], given[beside][name + "_scale_inv"] = codes, scales
                expected[name] = c.dequantized(codes, scales, (block, block))
    assert expected
    for path, tensors in given.items():
        save_file(tensors, path, metadata={"format": "pt"})
    weight_map = {name: path.name for path, tensors in given.items() for name in tensors}
    for path in folder.glob("*.index.json"):
        c.edit_json(path, lambda index: index.update(weight_map=weight_map))
    more = {"quantization_config": {**FP8_CONFIG, "weight_block_size": [block, block]}}
    c.edit_json(folder / "config.json", lambda config: config.update(more))
    return expected


def saved_qwen3(folder: Path):
    """Save a Qwen3 in several shards, in FP8; return it with the weights that must come out."""
    model = tiny_qwen3(3)
    model.save_pretrained(folder, max_shard_size="300KB")
    assert len([*folder.glob("*.safetensors")]) > 2
    model.eval().load_state_dict(quantize_saved(folder), strict=False)
    return model


@pytest.fixture
def qwen3(tmp_path):
    """The model of which the folders `in` and `out` hold the FP8 weights and the converted ones."""
    reference = saved_qwen3(tmp_path / "in")
    convert(tmp_path)
    return reference


def words_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ..."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, 200)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def assert_same_logits(model, reference) -> None:
    with torch.no_grad():
        got, expected = model(TOKENS).logits, reference(TOKENS).logits
    c.assert_same_bits(got, expected)
    assert got.std() > 0


@pytest.mark.parametrize("scale_dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", CONFIGS)
def test_converted_model_loads_with_the_same_logits_and_is_the_one_filled_from_memory(
        tmp_path, name, scale_dtype):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], dtype=BF16)
    model.save_pretrained(tmp_path / "in", max_shard_size="300KB")
    config = c.read_json(tmp_path / "in/config.json")
    expected = load_checkpoint(tmp_path / "in")
    expected |= quantize_saved(tmp_path / "in", scale_dtype=scale_dtype)
    write_checkpoint(tmp_path / "expected", {SHARD: expected}, config, index=False)
    convert(tmp_path)
    c.assert_same_tensors(load_checkpoint(tmp_path / "out"), expected)
    converted = load(tmp_path / "out")
    assert converted.dtype == BF16
    assert_same_logits(converted, load(tmp_path / "expected"))
    config = transformers.AutoConfig.from_pretrained(tmp_path / "in")
    del config.quantization_config
    filled = type(converted).from_pretrained(
        None, config=config, dtype="bfloat16", state_dict=dict(bf16_tensors(tmp_path / "in")))
    c.assert_same_tensors(filled.state_dict(), converted.state_dict())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_accelerate_dispatches_the_shards(tmp_path, qwen3, place):
    with init_empty_weights():
        model = transformers.AutoModelForCausalLM.from_config(qwen3.config, dtype=BF16).eval()
    devices = {"": "cpu"} if place == "cpu" else {
        "model.layers": "disk", "lm_head": "cpu",
        **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb"], "cpu")}
    model = load_checkpoint_and_dispatch(
        model, tmp_path / "out", devices, offload_folder=tmp_path / "offload", strict=True)
    assert_same_logits(model, qwen3)


@pytest.mark.parametrize("block, layers, intermediate", [
    (64, 1, 200),  # Its config names other blocks than the model's.
    (128, 2, 96),  # The model's names and other shapes.
    (None, 1, 200),  # In F32, and stays so.
])
def test_draft_model_in_a_folder_loads_and_drafts(tmp_path, block, layers, intermediate):
    reference, draft = saved_qwen3(tmp_path / "in"), tiny_qwen3(layers, intermediate)
    draft = draft if block else draft.float().eval()
    draft.save_pretrained(tmp_path / "in/dspark")
    if block:
        draft.eval().load_state_dict(quantize_saved(tmp_path / "in/dspark", block), strict=False)
    convert(tmp_path)
    pairs = [(load(tmp_path / "out"), load(tmp_path / "out/dspark")), (reference, draft)]
    for loaded, expected in zip(*pairs, strict=True):
        assert_same_logits(loaded, expected)
    got, expected = (
        model.generate(TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]),
                       assistant_model=assistant, max_new_tokens=8, do_sample=False)
        for model, assistant in pairs)
    assert got.tolist() == expected.tolist()


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
    convert(tmp_path)
    c.assert_same_tensors(load_file(tmp_path / "out/adapter_model.safetensors"), adapter)
    loaded = load(tmp_path / "out")
    assert_same_logits(loaded, reference)
    with reference.disable_adapter(), pytest.raises(AssertionError, match="element"):
        assert_same_logits(loaded, reference)


@pytest.mark.consumers
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_diffusers_pipeline_with_a_part_in_fp8(tmp_path, part):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4,
        cap_feat_dim=256, axes_dims=[16, 24, 24], axes_lens=[64, 64, 64])
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=16, shift_factor=0.1)
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae.to(BF16),
        text_encoder=tiny_qwen3(2).model, tokenizer=words_tokenizer(),
        transformer=transformer.to(BF16))
    pipeline.save_pretrained(tmp_path / "in", max_shard_size="700KB")
    assert len([*(tmp_path / "in" / part).glob("*.safetensors")]) > 1
    replaced = quantize_saved(tmp_path / "in" / part)
    getattr(pipeline, part).eval().load_state_dict(replaced, strict=False)
    convert(tmp_path)
    loaded = diffusers.ZImagePipeline.from_pretrained(tmp_path / "out", dtype=BF16)
    images = []
    for each in (loaded, pipeline):
        each.set_progress_bar_config(disable=True)
        images.append(each(
            "w5 w17 w120", height=32, width=32, num_inference_steps=2, guidance_scale=0,
            max_sequence_length=32, generator=torch.Generator().manual_seed(0),
            output_type="pt").images)
    c.assert_same_bits(*images)
    assert images[0].std() > 0


@pytest.mark.consumers
def test_sentence_transformers_with_a_dense_layer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.models")
    tiny_qwen3(2).model.save_pretrained(tmp_path / "model")
    words_tokenizer().save_pretrained(tmp_path / "model")
    transformer = modules.Transformer(str(tmp_path / "model"))
    parts = [transformer, modules.Pooling(256, pooling_mode="lasttoken"), modules.Dense(256, 64),
             modules.Normalize()]
    reference = library.SentenceTransformer(modules=parts, device="cpu")
    reference.save(str(tmp_path / "in"))
    replaced = quantize_saved(tmp_path / "in")
    transformer.auto_model.eval().load_state_dict(replaced, strict=False)
    convert(tmp_path)
    dense = [load_file(tmp_path / place / "2_Dense/model.safetensors") for place in ("out", "in")]
    c.assert_same_tensors(*dense)
    loaded = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    sentences = ["w3 w4 w5", "w100", "w7 w7 w199 w20"]
    embeddings = [each.encode(sentences, convert_to_tensor=True) for each in (loaded, reference)]
    assert embeddings[0].shape == (3, 64)
    c.assert_same_bits(*embeddings)


@pytest.mark.consumers
def test_fastsafetensors_reads_the_shards(tmp_path, qwen3):
    library = pytest.importorskip("fastsafetensors")
    paths = sorted(map(str, (tmp_path / "out").glob("*.safetensors")))
    with library.fastsafe_open(paths, device="cpu", nogds=True) as shards:
        got = {name: shards.get_tensor(name).clone() for name in shards.keys()}  # noqa: SIM118
    c.assert_same_tensors(got, qwen3.state_dict())


@pytest.mark.consumers
def test_mlx_lm_loads_and_computes_the_same_logits(tmp_path, qwen3):
    mx = pytest.importorskip("mlx.core")
    mlx_lm = pytest.importorskip("mlx_lm.utils")
    from mlx.utils import tree_flatten

    qwen3.save_pretrained(tmp_path / "reference")
    logits = []
    for folder in ("out", "reference"):
        model, _ = mlx_lm.load_model(tmp_path / folder)
        bits = {name: torch.tensor(weight.view(mx.int16).tolist(), dtype=torch.int16).view(BF16)
                for name, weight in tree_flatten(model.parameters())}
        c.assert_same_tensors(bits, qwen3.state_dict())
        logits.append(torch.tensor(model(mx.array(TOKENS.tolist())).astype(mx.float32).tolist()))
    c.assert_same_bits(*logits)
    assert logits[0].std() > 0


@pytest.mark.consumers
@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs LLAMA_CPP, llama.cpp's folder")
def test_llama_cpp_converts_the_output(tmp_path):
    """To the same bits as the output's, and as what it makes of the FP8 checkpoint by itself."""
    gguf = pytest.importorskip("gguf")
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = saved_qwen3(tmp_path / "in")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"w{number}" for number in range(200)), vocab_size=200,
        model_prefix=str(tmp_path / "in/tokenizer"), hard_vocab_limit=False, minloglevel=2)
    convert(tmp_path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    expected = {names.get_name(name, (".weight",)): tensor
                for name, tensor in reference.state_dict().items()}
    script = Path(os.environ["LLAMA_CPP"], "convert_hf_to_gguf.py")
    for folder in ("out", "in"):
        path = tmp_path / f"{folder}.gguf"
        c.python(script, tmp_path / folder, "--outfile", path, "--outtype", "bf16")
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            wanted = expected[name] if expected[name].ndim > 1 else expected[name].float()
            kind = "BF16" if wanted.dtype == BF16 else "F32"
            assert (tensor.tensor_type.name, [*tensor.shape]) == (kind, [*wanted.shape][::-1])
            assert tensor.data.tobytes() == wanted.view(torch.uint8).numpy().tobytes()


# --- what others make of the input ---


BYTES = torch.randint(100, 140, (256, 8), dtype=torch.uint8)  # Exponents.
WEIGHT, PACKED = {"weight": c.finite_codes(256, 256)}, {"weight_packed": c.packed(256, 128)}
MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
FP8_GROUP = {**FP8, "strategy": "group", "group_size": 64}
FP8_BLOCK = {**FP8, "strategy": "block", "block_structure": [128, 128]}
NVFP4 = PACKED | {"weight_global_scale": torch.tensor([613.0])}
SCHEMES = {  # compressed-tensors' format, the arguments of its scheme, and tensors.
    "tensor": ("float", {**FP8, "strategy": "tensor"}, WEIGHT, rand(1, dtype=BF16)),
    "channel": ("float", {**FP8, "strategy": "channel"}, WEIGHT, rand(256, 1, dtype=BF16)),
    "channel-f32": ("float", {**FP8, "strategy": "channel"}, WEIGHT, rand(256, 1)),
    "group": ("float", FP8_GROUP, WEIGHT, rand(256, 4, dtype=BF16)),
    "block": ("float", FP8_BLOCK, WEIGHT, rand(2, 2)),
    "mxfp8": ("mxfp8", {**FP8, **MX}, WEIGHT, BYTES),
    "mxfp4": ("mxfp4-pack", {**FP4, **MX}, PACKED, BYTES),
    "nvfp4": ("nvfp4-pack", {**FP4, "scale_dtype": torch.float8_e4m3fn}, NVFP4,
              c.finite_codes(256, 16).abs()),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_decompresses_to_the_same_bits(tmp_path, name):
    kind, arguments, given, scale = SCHEMES[name]
    given = given | {"weight_scale": scale}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(f"{kind}-quantized")
    theirs = compressor.decompress(dict(given), scheme)["weight"].to(BF16)
    groups = {"group_0": scheme.model_dump(mode="json")}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    tensors = {f"m.{key}": tensor for key, tensor in given.items()}
    write_checkpoint(tmp_path / "in", {SHARD: tensors}, {"quantization_config": config})
    convert(tmp_path)
    c.assert_same_bits(load_checkpoint(tmp_path / "out")["m.weight"], c.canonical(theirs))


def load_fp8(folder: Path):
    """Load an FP8 checkpoint with transformers, which dequantizes it."""
    dequantize = transformers.FineGrainedFP8Config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantize)


def assert_loads_alike(folder: Path) -> None:
    """Compare what transformers makes of the FP8 checkpoint itself with what it loads of ours."""
    ours, theirs = load(folder / "out"), load_fp8(folder / "in").state_dict()
    assert ours.dtype == BF16
    # DeepSeek-V4's norms are widened, but not under a quantization.
    ours = {name: tensor.to(theirs[name].dtype) if "norm" in name else tensor
            for name, tensor in ours.state_dict().items()}
    c.assert_same_tensors(ours, theirs)


def test_transformers_dequantizes_qwen3_to_the_same_bits(tmp_path):
    # Whole blocks only: transformers computes the block from the shapes, which is wrong for ragged.
    tiny_qwen3(2, 384).save_pretrained(tmp_path / "in")
    quantize_saved(tmp_path / "in", scale_dtype=BF16)
    convert(tmp_path)
    assert_loads_alike(tmp_path)


def test_transformers_dequantizes_deepseek_v4_to_the_same_bits(tmp_path):
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(
        vocab_size=256, hidden_size=256, moe_intermediate_size=128, head_dim=64,
        num_attention_heads=4, num_key_value_heads=1, index_n_heads=2, o_groups=2, q_lora_rank=128,
        o_lora_rank=64, index_head_dim=64, index_topk=8, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, hc_mult=2, num_hidden_layers=4, sliding_window=16)

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

    transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).save_pretrained(
        tmp_path / "master")
    given = {}
    for name, tensor in load_checkpoint(tmp_path / "master").items():
        given |= quantize(name, tensor) or {name: tensor}
    saved = c.read_json(tmp_path / "master/config.json") | {"expert_dtype": "fp4"}
    saved["quantization_config"] = {
        **FP8_CONFIG, "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    write_checkpoint(tmp_path / "in", {SHARD: given}, saved, index=False)
    convert(tmp_path)
    assert "expert_dtype" not in (tmp_path / "out/config.json").read_text()
    assert_loads_alike(tmp_path)


def test_transformers_is_wrong_where_the_last_block_is_cut_off(tmp_path):
    """192 rows over 2 rows of scales: blocks of 128 by the format, of 96 in transformers 5.23.

    It divides the rows by the rows of scales, where the format fixes the block and cuts the last.
    """
    tiny_qwen3(1, 192).save_pretrained(tmp_path / "in")
    name = "model.layers.0.mlp.up_proj.weight"
    expected, given = quantize_saved(tmp_path / "in")[name], load_checkpoint(tmp_path / "in")
    computed = c.dequantized(given[name], given[f"{name}_scale_inv"], (96, 128))
    assert not torch.equal(expected, computed)
    convert(tmp_path)
    c.assert_same_bits(load_checkpoint(tmp_path / "out")[name], expected)
    theirs = load_fp8(tmp_path / "in").state_dict()[name]
    # A transformers that has mended this computes what we do.
    assert any(torch.equal(theirs, values) for values in (expected, computed))
