"""Files with right checksums that no run wrote: refused by name, before anything is used."""

import os

import pytest
import torch

from evomoe_plugin.checkpoint.content import check_moments
from evomoe_plugin.checkpoint.load import read_state
from evomoe_plugin.config.errors import OptionError
from tests.checkpoint.test_checkpoint_reading import state

NAN = float("nan")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": []}, "its 'model' is not tensors by name"),
        ({"model": {"w": "text"}}, "'w' of its 'model' is no tensor"),
        ({"model": {"w": torch.zeros(1).expand(2**40)}}, "w has 1099511627776 elements, of which"),
        ({"extra_state": None}, "TypeError|how far the run was"),
        ({"extra_state": {"train_iterator": {"epoch": -1}}}, "has epoch -1"),
        ({"extra_state": {"train_iterator": {"iterations_in_epoch": "one"}}}, "in_epoch 'one'"),
        ({"optimizer_history": [{"num_updates": 2.5}]}, "its number of updates is 2.5|KeyError"),
        ({"optimizer_history": "text"}, "its optimizer_history is no list|Error"),
        ({"cfg": None}, "it has no options"),
        ({"cfg": 3}, "AttributeError|it has no options"),
        ({"cfg": "model: {}"}, "AttributeError|it has no options"),
        ({"cfg": {"a": torch.zeros(2)}}, "ConfigValueError|its options .* name no model"),
        ({"cfg": {"task": {}, "model": [1]}}, "its options .* name no model"),
        (
            {"cfg": {"model": {}, "task": {"data": "${oc.env:HOME}"}}},
            r"its option task.data is computed by a res",
        ),
        ({"last_optimizer_state": [3]}, "its optimizer state is none"),
        ({"last_optimizer_state": {"a": torch.zeros(2)}}, "its optimizer state is none"),
        ({"last_optimizer_state": {"state": []}}, "its optimizer state is none"),
    ],
)
def test_content_that_no_run_wrote(tmp_path, changed, message):
    torch.save(state(**changed), tmp_path / "c.pt")
    with pytest.raises(
        OptionError, match=rf"^--checkpoint .*c\.pt: is no checkpoint of .*({message})"
    ):
        read_state(str(tmp_path / "c.pt"))


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        with pytest.raises(OptionError, match=rf"{name}: is no file"):
            read_state(str(tmp_path / name))
    with pytest.raises(OptionError, match=r"nowhere\.pt: cannot be read: No such file"):
        read_state(str(tmp_path / "nowhere.pt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("exp_avg"), "of a parameter has no exp_avg"),
        (lambda e: e.update(exp_avg=torch.zeros(4)), "has exp_avg of 4 numbers for 2 weights"),
        (lambda e: e.pop("step"), "of a parameter has no step"),
        (lambda e: e["exp_avg_sq"].fill_(NAN), "has NaN/Inf in exp_avg_sq"),
    ],
)
@pytest.mark.parametrize("others", [0, 1])
def test_moments_that_are_not_of_the_parameters(change, message, others):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(1 + others)]
    optimizer = torch.optim.Adam(weights)
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    check_moments(optimizer, "c.pt", elementwise=True)
    change(optimizer.state[weights[0]])
    with pytest.raises(
        OptionError, match=f"^--checkpoint c.pt: its optimizer state {message}: take"
    ):
        check_moments(optimizer, "c.pt", elementwise=True)
