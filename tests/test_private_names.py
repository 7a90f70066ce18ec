"""What other packages do not promise to keep, by name: another version that lacks one is named here, not deep in a run."""

import importlib

import pytest

from lora_null.utils.private_names import SEEN


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
    assert found(name), f"{name} was there in {SEEN[name]} and is gone: see lora_null/utils/private_names.py"
