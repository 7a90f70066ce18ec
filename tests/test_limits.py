"""Settings are held against what a model can do, before work: positions, processors, architectures."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trainer import make
from tiny import random_batches, tiny_model, tiny_tokenizer
from trainers import CUT, PAIRS, ROWS, TEXTS, quick
from trl import DPOConfig, SFTConfig
from world import make_world, write_rows

from lora_null import LoraNullConfig, UserError, initialize_lora_null_weights
from lora_null.__main__ import main as command
from lora_null.adapters.merge import Delta, write_checkpoint
from lora_null.checkpoint_reader import adapters_in_memory, open_in_files
from lora_null.eval_harness import AnswerTask, LmEvalTask, evaluate
from lora_null.eval_harness.generate import generate_texts
from lora_null.layer import adapted_layers
from lora_null.recipes import measure
from lora_null.recipes.__main__ import main
from lora_null.targets import add_adapter, refusing_in_one_line
from lora_null.trainer import CalibrationArgs, LoraNullDPOTrainer, LoraNullSFTTrainer
from lora_null.trainer.calibration_data import calibration_windows
from lora_null.utils.limits import position_limit, why_unsupported
from lora_null.utils.tokens import tokenizer_of

IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
WIDE = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IDS)
SMALL = dict(WIDE, intermediate_size=48, max_position_embeddings=32)
GATED = dict(SMALL, num_key_value_heads=2)
GPT2 = dict(vocab_size=101, n_embd=32, n_layer=2, n_head=4, **IDS)
BART = dict(vocab_size=101, d_model=32, max_position_embeddings=32, encoder_layers=1, decoder_layers=1, **IDS)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48)
T5 = dict(vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
MAMBA = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=8, **IDS)

# configuration → (positions, whether there are none beyond); None: no limit
POSITIONS = {
    "gpt2": (tf.GPT2Config(n_positions=32, **GPT2), (32, True)),
    "gptj": (tf.GPTJConfig(n_positions=32, rotary_dim=8, **GPT2), (32, True)),
    "opt": (tf.OPTConfig(ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, **WIDE), (32, True)),
    "bert": (tf.BertConfig(is_decoder=True, **SMALL), (32, True)),
    "roberta": (tf.RobertaConfig(is_decoder=True, **SMALL), (31, True)),
    "biogpt": (tf.BioGptConfig(**SMALL), (32, True)),
    "mpt": (tf.MptConfig(vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=32), (32, True)),
    "bart's decoder": (tf.BartConfig(is_decoder=True, is_encoder_decoder=False, **BART), (32, True)),
    "llama": (tf.LlamaConfig(**GATED), (32, False)),
    "neox": (tf.GPTNeoXConfig(**SMALL), (32, False)),
    "mistral, windows of 16": (tf.MistralConfig(sliding_window=16, **GATED), (32, False)),
    "xglm": (tf.XGLMConfig(vocab_size=101, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48,
                           max_position_embeddings=32, **IDS), (32, False)),
    "bloom": (tf.BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4), None),
    "mamba": (tf.MambaConfig(**MAMBA), None),
}  # fmt: skip


def gpt2(positions=64):
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_positions=positions, initializer_range=0.3, **GPT2))


@pytest.mark.parametrize("name", POSITIONS)
def test_a_limit_is_what_the_forward_pass_takes(name):
    config, expected = POSITIONS[name]
    limit = position_limit(config)
    assert (limit and (limit.tokens, limit.hard)) == expected
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    row = lambda n: {"input_ids": torch.full((1, n), 7), "attention_mask": torch.ones(1, n, dtype=torch.long)}  # noqa: E731
    with torch.no_grad():
        model(**row(limit.tokens if limit else 40))
        if limit and limit.hard:
            with pytest.raises((IndexError, RuntimeError)):
                model(**row(limit.tokens + 1))
        else:
            model(**row(41))


class TestCalibrationWindows:
    def trainer(self, folder, model, *, calibration=TEXTS, **arguments):
        args = SFTConfig(**quick(folder, max_length=48))
        arguments = dict(args=args, train_dataset=ROWS, calibration_dataset=calibration) | arguments
        return LoraNullSFTTrainer(
            model, processing_class=tiny_tokenizer(), peft_config=LoraNullConfig(r=4), **arguments
        )

    @pytest.mark.parametrize("arguments", [None, CalibrationArgs(samples=16)])
    def test_the_default_is_cut_to_the_table_and_one_line_says_so(self, tmp_path, capsys, arguments):
        trainer = self.trainer(tmp_path, gpt2(), calibration_args=arguments)
        trainer.train()
        said = capsys.readouterr().err
        assert said.count("64 tokens instead of 1024, GPT2LMHeadModel takes 64 (n_positions)") == 1
        assert trainer.layer_report.tokens >= 256

    def test_a_length_that_was_asked_for_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=r"calibration_args.max_length: 65 tokens .* takes 64 \(n_positions\)"):
            self.trainer(tmp_path, gpt2(), calibration_args=CalibrationArgs(max_length=65))

    def test_windows_that_are_ready(self, tmp_path):
        windows = [{"input_ids": [7] * 64}] * 8 + [{"input_ids": [7] * 65}]
        with pytest.raises(UserError, match="a window has 65 tokens, GPT2LMHeadModel takes 64"):
            self.trainer(tmp_path, gpt2(), calibration=windows).train()

    def test_rotary_positions_go_on_and_say_so(self, tmp_path, capsys):
        trainer = self.trainer(tmp_path, tiny_model(max_position_embeddings=40))
        trainer._calibration_args = CalibrationArgs(samples=8, max_length=100)
        trainer.train()
        said = capsys.readouterr().err
        assert "a window has 100 tokens, LlamaForCausalLM was trained on 40 (max_position_embeddings)" in said

    def test_sliding_windows_have_no_end(self, tmp_path, capsys):
        config = tf.MistralConfig(**{**GATED, "max_position_embeddings": 512}, sliding_window=16)
        self.trainer(tmp_path, tf.MistralForCausalLM(config), calibration_args=CUT).train()
        assert "was trained on" not in capsys.readouterr().err


class TestTrainingRows:
    rows = Dataset.from_dict({"input_ids": [[7] * 20 + [2]] * 200 + [[7] * 70 + [2]] + [[7] * 20 + [2]] * 200})

    def test_one_row_in_the_middle_that_is_too_long(self, tmp_path):
        trainer = make(tmp_path, model=gpt2(), rows=self.rows, max_length=1024)
        with pytest.raises(UserError, match=r"a row has 71 tokens, GPT2LMHeadModel takes 64 .*max_length=64 cuts it"):
            trainer.train()
        assert trainer.layer_report is None

    @pytest.mark.parametrize("rows, length", [(rows, 64), (ROWS, 1024), (ROWS, None)])
    def test_rows_that_are_cut_or_short_train(self, tmp_path, rows, length):
        make(tmp_path, model=gpt2(), rows=rows, max_length=length).train()

    def test_rows_to_evaluate(self, tmp_path):
        trainer = make(tmp_path, model=gpt2(), max_length=1024)
        trainer.eval_dataset = self.rows
        with pytest.raises(UserError, match="a row has 71 tokens"):
            trainer.train()

    def test_preferences(self, tmp_path):
        long = Dataset.from_dict({"prompt": ["why?"], "chosen": ["a" * 90], "rejected": ["no"]})
        trainer = LoraNullDPOTrainer(
            gpt2(),
            args=DPOConfig(**quick(tmp_path, max_steps=4, max_length=128)),
            train_dataset=long,
            processing_class=tiny_tokenizer(),
            peft_config=LoraNullConfig(r=4),
            calibration_dataset=TEXTS,
        )
        with pytest.raises(UserError, match="a row has 95 tokens, GPT2LMHeadModel takes 64"):
            trainer.train()

    def test_rotary_positions_go_on_and_say_so(self, tmp_path, capsys):
        make(tmp_path, model=tiny_model(max_position_embeddings=32), rows=self.rows.select(range(198, 204))).train()
        assert "max_length: a row has 71 tokens, LlamaForCausalLM was trained on 32" in capsys.readouterr().err


class TestEvaluation:
    def test_answers_beyond_a_table_are_refused(self):
        task = AnswerTask("long", [("Q:", "x" * 80)])
        with pytest.raises(UserError, match="pair 0 has 82 tokens, the model takes 64"):
            evaluate(gpt2(), tiny_tokenizer(), [task])

    def test_beyond_what_rotary_positions_were_trained_on_is_said(self, capsys):
        model = tiny_model(max_position_embeddings=32)
        for progress in (True, False):  # probes show no bar
            found = evaluate(model, tiny_tokenizer(), [AnswerTask("long", [("Q:", "x" * 80)])], progress=progress)
            assert found.metrics["long nll"].n == 1
            said = capsys.readouterr().err
            assert "evaluation task 'long': a pair has 82 tokens, LlamaForCausalLM was trained on 32" in said
            assert ("1/1" in said) is progress

    def test_answers_leave_room_for_the_prompt(self, capsys):
        options = {"temperatures": [0.0, 0.0], "batch_size": 1}
        with pytest.raises(UserError, match="max_new_tokens: 64 leave no room for a prompt"):
            generate_texts(gpt2(), tiny_tokenizer(), ["x" * 99], max_new_tokens=64, **options)
        generate_texts(gpt2(), tiny_tokenizer(), ["x" * 99, "x"], max_new_tokens=40, **options)
        assert "1 of 2 prompts lose their beginning, GPT2LMHeadModel takes 64" in capsys.readouterr().err

    @pytest.mark.parametrize("takes", ["takes", "was trained on"])
    def test_answers_of_lm_evals_tasks_leave_room_for_the_prompt(self, tmp_path, takes):
        model = gpt2(256) if takes == "takes" else tiny_model(max_position_embeddings=256)
        path = str(write_rows(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "#### 2"}]))
        with pytest.raises(UserError, match=f"answers of up to 512 tokens leave no room for a prompt, .* {takes} 256"):
            evaluate(model, tiny_tokenizer(), [LmEvalTask("metamath_gsm8k", path=path)])

    def test_a_recipe_says_so_before_a_model_loads(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("lora_null.recipes.measure.base_to_run", lambda *_: pytest.fail("weights were loaded"))
        recipe = make_world(tmp_path)
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
        write_rows(tmp_path / "g.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
        task = f"eval.task=[{{task: metamath_gsm8k, path: {tmp_path}/g.jsonl}}]"
        assert main([str(recipe), task, "data.template=alpaca"]) == 2
        assert "answers of up to 512 tokens leave no room for a prompt" in capsys.readouterr().err

    def test_a_processor_in_place_of_a_tokenizer(self):
        model = tiny_model()
        task = AnswerTask("a", [("Q:", " yes"), ("W:", " no")])
        plain, wrapped = (evaluate(model, given, [task]) for given in (tiny_tokenizer(), processor()))
        assert plain.metrics == wrapped.metrics


@pytest.fixture
def gpt2_recipe(tmp_path, monkeypatch):
    """A recipe on a model of 64 learned positions; a model load fails the test."""
    monkeypatch.setattr(measure, "base_to_run", lambda *_: pytest.fail("a model was loaded"))
    recipe = make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4})
    gpt2().save_pretrained(tmp_path / "model")
    return recipe


LONG_ANSWER = [{"prompt": "why", "completion": "a" * 90}] * 8
RECIPE_CASES = {
    "windows": (
        ["calibration.max_length=65"],
        "calibration.max_length: 65 tokens are too long, GPT2LMHeadModel takes",
    ),
    "rows": (
        ["data.path={folder}/long.jsonl", "data.prompt=prompt", "data.response=completion", "training.max_length=128"],
        "training.max_length=64 cuts it",
    ),
    "held-out answers": (
        ["eval.task=[{{answers: n, path: {folder}/long.jsonl, prompt: prompt, response: completion}}]"],
        "evaluation task 'n': pair 0 has",
    ),
}


@pytest.mark.parametrize("name", RECIPE_CASES)
def test_a_recipe_says_what_is_too_long_before_a_model_loads(gpt2_recipe, tmp_path, capsys, name):
    words, message = RECIPE_CASES[name]
    write_rows(tmp_path / "long.jsonl", LONG_ANSWER)
    assert main([str(gpt2_recipe), *(word.format(folder=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_cuts_default_windows(tmp_path, capsys):
    recipe = make_world(tmp_path, method={"name": "lora-null-v2", "rank": 4}, eval={"cache": False})
    gpt2(128).save_pretrained(tmp_path / "model")
    assert main([str(recipe), "calibration.max_length=1024"]) == 0
    assert "calibration.max_length: 128 tokens instead of 1024" in capsys.readouterr().err


def test_init_cuts_default_windows_and_refuses_others(tmp_path, capsys, monkeypatch):
    make_world(tmp_path)
    gpt2(128).save_pretrained(tmp_path / "model")
    words = ["init", "--model", str(tmp_path / "model"), "--calibration", str(tmp_path / "facts.jsonl"), "--rank", "4"]
    words += ["--dtype", "float32", "--no-cache"]
    assert command([*words, "--out", str(tmp_path / "a"), "--max-length", "129"]) == 2
    assert "--max-length: 129 tokens are too long" in capsys.readouterr().err
    assert command([*words, "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().err
    assert "--max-length: 128 tokens instead of 1024" in said and "of 256 windows, " in said
    assert command([*words, "--out", str(tmp_path / "c"), "--samples", "1"]) == 2
    said = capsys.readouterr()
    assert "tokens, at least 256 are needed" in said.err and "written" not in said.out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    assert command([*words, "--out", str(tmp_path / "d")]) == 2
    assert f"--out: {tmp_path / 'd'} has 0.0 GB free" in capsys.readouterr().err


class _Processor(tf.ProcessorMixin):
    """A processor that has nothing but a tokenizer, which is all that text needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat_template = None

    def __call__(self, text=None, images=None, **kwargs):
        return self.tokenizer([text] if isinstance(text, str) else text, **kwargs)  # as processors do


def processor():
    return _Processor(tiny_tokenizer())


def test_the_tokenizer_of_what_trainers_are_given():
    tokenizer = tiny_tokenizer()
    assert tokenizer_of(tokenizer) is tokenizer
    given = processor()
    assert tokenizer_of(given) is given.tokenizer
    given.chat_template = "{% for m in messages %}{{ m.content }} |{% endfor %}"
    text = calibration_windows([[{"role": "user", "content": "gold"}]], given, CalibrationArgs(mode="separate"))
    assert tokenizer.decode(text[0]).endswith("gold |") and not given.tokenizer.chat_template
    tokenizer.tokenizer = "an engine of its own"
    assert tokenizer_of(tokenizer) is tokenizer
    given.tokenizer = None
    with pytest.raises(UserError, match="_Processor holds no tokenizer"):
        tokenizer_of(given)


TEXT = {key: value for key, value in GATED.items() if key != "max_position_embeddings"}
EYES = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
ROPE = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
SEEING = {
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**EYES), image_token_id=5)
    ),
    "gemma3": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=dict(TEXT, head_dim=8), vision_config=EYES, mm_tokens_per_image=4, image_token_index=5)
    ),
    "qwen2-vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config=dict(TEXT, rope_parameters=ROPE),
            vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=32, patch_size=14),
            image_token_id=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
        )
    ),
}  # fmt: skip
INSIDE = r".*language_model.*(q_proj|v_proj|down_proj)"


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_a_model_that_sees_trains_on_text_with_its_processor(tmp_path, name, variant):
    config = LoraNullConfig(r=4, variant=variant, target_modules=INSIDE)
    trainer = make(tmp_path, config, model=SEEING[name](), tokenizer=processor(), max_steps=2)
    trainer.train()
    assert len(trainer.layer_report.layers) == len(adapted_layers(trainer.model)) == 6
    assert trainer.drift_meter.summary()["mean"] > 0


@pytest.mark.parametrize("name", SEEING)
def test_its_files_name_weights_otherwise_than_the_model_does(tmp_path, name):
    """Llava's `language_model.model.layers…` is `model.language_model.layers…` in the model; read and merged by either."""
    torch.manual_seed(0)
    made, batches = SEEING[name]().eval(), random_batches(6)
    made.save_pretrained(tmp_path / "model")
    load, config = type(made).from_pretrained, LoraNullConfig(r=4, variant="v2", target_modules=INSIDE)
    live = get_peft_model(load(tmp_path / "model", dtype=torch.float32), config)
    initialize_lora_null_weights(live, batches, progress=False)
    empty, files = open_in_files(load, str(tmp_path / "model"), dtype=torch.float32)
    with adapters_in_memory():
        apart = get_peft_model(empty, config)
    initialize_lora_null_weights(apart, batches, progress=False, weights=files)
    layers, others = adapted_layers(live, "default"), adapted_layers(apart, "default")
    assert len(layers) == 6
    deltas = {}
    for path, layer in layers.items():
        A, B = layer.lora_A["default"].weight.detach(), torch.randn_like(layer.lora_B["default"].weight)
        torch.testing.assert_close(others[path].lora_A["default"].weight.detach(), A)
        deltas[path] = Delta(A, B, 0.5)
    write_checkpoint(tmp_path / "model", tmp_path / "merged", deltas, made)
    made.config.save_pretrained(tmp_path / "merged")
    merged = dict(load(tmp_path / "merged", dtype=torch.float32).named_parameters())
    for path, weight in made.named_parameters():
        delta = deltas.get(path.removesuffix(".weight"))
        wanted = weight.double() + (0.5 * delta.B.double() @ delta.A.double() if delta else 0)
        torch.testing.assert_close(merged[path].double(), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_and_on_preferences(tmp_path, variant):
    trainer = LoraNullDPOTrainer(
        SEEING["llava"](),
        args=DPOConfig(**quick(tmp_path, max_steps=2)),
        train_dataset=PAIRS,
        processing_class=processor(),
        peft_config=LoraNullConfig(r=4, variant=variant, target_modules=INSIDE),
        calibration_dataset=TEXTS,
        calibration_args=CUT,
    )
    trainer.train()
    assert trainer.something_moved


def test_what_text_does_not_reach_is_named_before_work(tmp_path):
    with pytest.raises(
        UserError, match=r"model.vision_tower.* and 7 more lie outside the decoder of LlavaForConditional"
    ) as no:
        make(tmp_path, model=SEEING["llava"]())
    assert (
        "target_modules=r'model\\.language_model.*(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)'"
        in str(no.value)
    )


@pytest.mark.parametrize("targets, named, inside", [
    (["q_proj"], "model.vision_tower", "q_proj"),
    (r".*(layers.0.self_attn.q_proj|linear_1)", "model.", "q_proj"),
    (["linear_1"], "model.multi_modal_projector.linear_1 lies", "down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj"),
])  # fmt: skip
def test_nor_does_a_start_measure_first(targets, named, inside, monkeypatch):
    monkeypatch.setattr("lora_null.fingerprint.fingerprint", None)
    peft_model = get_peft_model(SEEING["llava"](), LoraNullConfig(r=2, target_modules=targets))
    with pytest.raises(UserError, match=f"target_modules: {named}.* outside the decoder of LlavaForCond") as no:
        initialize_lora_null_weights(peft_model, random_batches(), min_tokens=1)
    assert rf"target_modules=r'model\.language_model.*({inside})' names those inside" in str(no.value)


UNABLE = {
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "T5ForConditionalGeneration is an encoder–decoder",
    ),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)), "is an encoder–decoder"),
    "bert": (lambda: tf.BertLMHeadModel(tf.BertConfig(**SMALL)), "BertLMHeadModel sees the tokens"),
    "no head": (lambda: tf.LlamaModel(tf.LlamaConfig(**GATED)), "LlamaModel has no language-model head"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_an_architecture_that_cannot_is_named_before_work(tmp_path, name):
    model, reason = UNABLE[name][0](), UNABLE[name][1]
    with pytest.raises(UserError, match=f"model: .*{reason}"):
        make(tmp_path, model=model)


def test_of_a_name_nothing_is_loaded(tmp_path, monkeypatch):
    UNABLE["t5"][0]().save_pretrained(tmp_path / "t5")
    monkeypatch.setattr(tf.T5ForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="T5ForConditionalGeneration is an encoder–decoder"):
        make(tmp_path / "out", model=str(tmp_path / "t5"))


@pytest.mark.parametrize("kind", [*UNABLE][:3])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_recipe_names_it_before_anything_loads(tmp_path, capsys, kind, dry):
    recipe = make_world(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    UNABLE[kind][0]().config.save_pretrained(tmp_path / "model")
    assert main([str(recipe), *dry]) == 2
    assert "model.name_or_path: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [tf.ViTConfig(), tf.WhisperConfig(), tf.CLIPConfig()], ids=["vit", "whisper", "clip"]
)
def test_what_is_no_language_model(config):
    assert config.model_type in why_unsupported(config).lower()


@pytest.mark.parametrize("name", ["bert", "bart's decoder", "gpt2", "mamba", "llama"])
def test_decoders_are_able(name):
    assert why_unsupported(POSITIONS[name][0]) is None


def test_a_state_space_trains(tmp_path):
    config = LoraNullConfig(r=4, target_modules=["in_proj"])
    trainer = make(tmp_path, config, model=tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)), max_steps=2)
    trainer.train()
    assert len(trainer.layer_report.layers) == 2


class TestExperts:
    def mixtral(self):
        return tf.MixtralForCausalLM(tf.MixtralConfig(**GATED, num_local_experts=4))

    def qwen3_moe(self):
        shape = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**GATED, **shape))

    def test_fused_ones_that_stay_are_said(self, tmp_path, capsys):
        make(tmp_path, LoraNullConfig(r=4, target_modules=["q_proj", "o_proj"]), model=self.mixtral())
        said = capsys.readouterr().err
        assert "the experts of MixtralForCausalLM are fused parameters, no linears, and stay as they are" in said
        assert "experts.gate_up_proj and 3 more, " in said

    def test_fused_ones_that_were_asked_for_are_refused(self, tmp_path):
        with pytest.raises(
            UserError,
            match=r"layers.0.mlp.experts holds fused experts.*target_modules=\['k_proj', 'o_proj', 'q_proj', 'v_proj'\]",
        ):
            make(tmp_path, model=self.mixtral())

    @pytest.mark.parametrize("shape", ["mixtral", "qwen3_moe"])
    @pytest.mark.parametrize(
        ("targets", "line"),
        [
            ({"target_modules": "all-linear"}, r"layers.0.mlp.experts holds fused .*\['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"),
            ({"target_modules": ["gate", "q_proj"]}, r"layers.0.mlp.gate is a router, no linear.*\['q_proj'\]"),
            ({"target_modules": ["experts"]}, r"a \w+Experts is no linear"),
            ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters: not supported"),
        ],
    )  # fmt: skip
    def test_every_way_to_ask_for_them_is_one_line(self, shape, targets, line):
        model = getattr(self, shape)()
        with pytest.raises(UserError, match=line) as mistake, refusing_in_one_line():
            initialize_lora_null_weights(get_peft_model(model, LoraNullConfig(r=2, **targets)), random_batches())
        assert "\n" not in str(mistake.value)

    @pytest.mark.parametrize("kind", [LoraConfig, LoraNullConfig])
    def test_a_recipe_names_them_and_no_pattern_of_pefts(self, kind):
        with pytest.raises(
            UserError, match=r"layers.0.mlp.experts holds fused .*\['k_proj', 'o_proj', 'q_proj', 'v_proj'\]"
        ):
            add_adapter(self.mixtral(), kind(r=2, target_modules="all-linear"))

    @pytest.mark.parametrize("shape", ["mixtral", "qwen3_moe"])
    def test_without_a_trainer_what_stays_is_said_too(self, shape, capsys):
        model = get_peft_model(getattr(self, shape)(), LoraNullConfig(r=2, target_modules=["q_proj", "gate_up_proj"]))
        report = initialize_lora_null_weights(model, random_batches(), min_tokens=1, progress=False)
        assert len(report.layers) == 2 and "are fused parameters, no linears, and stay" in capsys.readouterr().err
