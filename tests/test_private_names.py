"""What other packages do not promise to keep, by name: another version that lacks one is named here, not deep in a run."""

import importlib

import pytest

# What the package uses because nothing public does the same, with the version it was seen in; lm-eval's names have a test of
# their own, tests/eval_harness/test_private_names.py.
SEEN = {
    # PEFT asks a custom layer to be registered so (its documentation calls it experimental).
    "peft.LoraConfig._register_custom_module": "peft 0.21.0",
    # Keeps a factor out of training through PEFT's own record, which survives `set_adapter`.
    "peft.tuners.tuners_utils.BaseTunerLayer._freeze_non_trainable_peft_weights": "peft 0.21.0",
    # Casts an input as PEFT's own forward pass does.
    "peft.tuners.tuners_utils.BaseTunerLayer._cast_input_dtype": "peft 0.21.0",
    # Moves an adapter to its base layer's device, also where that is "meta" and has no memory.
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer": "peft 0.21.0",
    # Makes a model of the same kind again, for the buffers that are computed and in no file.
    "transformers.PreTrainedModel._from_config": "transformers 5.23.0",
    # How a model attends: with flash-attn a model that is on the CPU cannot be run there.
    "transformers.PreTrainedConfig()._attn_implementation": "transformers 5.23.0",
    # Which buffers a checkpoint holds: PyTorch tells it nowhere else.
    "torch.nn.Module()._non_persistent_buffers_set": "torch 2.13.0",
    # Whether somebody's code runs before or after a module's own.
    "torch.nn.Module()._forward_hooks": "torch 2.13.0",
    "torch.nn.Module()._forward_pre_hooks": "torch 2.13.0",
    # Where tensors that an engine keeps in pieces stand in for whole ones for a while.
    "torch.nn.Module()._parameters": "torch 2.13.0",
    # What of a group of modules a forward pass has not yet called.
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state": "torch 2.13.0",
    "torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState()._modules_to_run_forward": "torch 2.13.0",
    # Overridden: a layer whose base lacks a residual takes a state apart before its parts load.
    "torch.nn.Module._load_from_state_dict": "torch 2.13.0",
    # Overridden, as transformers' documentation suggests for a Trainer's subclasses.
    "transformers.Trainer._save": "transformers 5.23.0",
    "transformers.Trainer._save_checkpoint": "transformers 5.23.0",
    "transformers.Trainer._load_from_checkpoint": "transformers 5.23.0",
    "transformers.Trainer._load_best_model": "transformers 5.23.0",
    "transformers.Trainer._get_output_dir": "transformers 5.23.0",
    "transformers.Trainer._push_from_checkpoint": "transformers 5.23.0",
    # Collates a batch as training does, to look at its labels.
    "transformers.Trainer._get_collator_with_removed_columns": "transformers 5.23.0",
    # Whether TRL's loss takes the positions that are taught or all of them.
    "trl.trainer.utils._use_triton": "trl 1.16.0",
    # How transformers decides to shard weights as it makes a model (recipes/private_names.py).
    "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref": "transformers 5.23.0",
    # Lets one process of several GPUs train on one (recipes/private_names.py).
    "transformers.TrainingArguments()._n_gpu": "transformers 5.23.0",
    # Makes the client that asks whether the hub answers (recipes/private_names.py).
    "huggingface_hub.utils._http.default_client_factory": "huggingface_hub 2.4.0",
}


def found(path):
    instance = path.replace("()", "")
    for cut in range(instance.count("."), 0, -1):
        module, names = instance.rsplit(".", cut)[0], instance.rsplit(".", cut)[1:]
        try:
            value = importlib.import_module(module)
        except ImportError:
            continue
        for name in names[:-1]:
            value = getattr(value, name)
        return hasattr(value() if "()" in path else value, names[-1])
    return False


@pytest.mark.parametrize("name", SEEN)
def test_it_is_still_there(name):
    assert found(name), f"{name} was there in {SEEN[name]} and is gone"
