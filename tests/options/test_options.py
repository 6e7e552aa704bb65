"""Options are declared once: the interface takes what is declared, with those defaults, and refuses what is not taken."""
import inspect

import pytest

from stream_reshard import api
from stream_reshard.cli.flags import options_in, parser_of
from stream_reshard.errors import UsageError
from stream_reshard.options import ForwardOptions, Options, VerifyOptions
from stream_reshard.options.declaring import options_of

BESIDE = {"source", "destination", "copy", "stop", "progress"}
"""Parameters that are no options."""


@pytest.mark.parametrize("function, options", [
    (api.plan, Options), (api.verify, VerifyOptions), (api.plan_forward, ForwardOptions)])
def test_the_interface_spells_out_what_is_declared(function, options):
    parameters = inspect.signature(function).parameters
    declared = {own.name: own.default for own in options_of(options)}
    assert {name: own.default for name, own in parameters.items() if name not in BESIDE} == declared
    assert all(own.kind != own.VAR_KEYWORD for own in parameters.values())


def test_the_command_line_has_a_flag_for_each():
    for command in ("convert", "plan", "verify"):
        actions = {flag: action for action in parser_of(command)._actions for flag in action.option_strings}
        for own in options_in(command).values():
            assert actions[own.flag].help == own.text
            assert tuple(actions[own.flag].choices or ()) == own.choices


@pytest.mark.parametrize("choice, words", [
    ({"to": "hugging_face"}, "--to 'hugging_face': choose nanotron or hf"),
    ({"to": "HF"}, "did you mean hf?"),
    ({"rope": "interleave"}, "choose auto, neox or interleaved; did you mean interleaved?"),
    ({"checkpoint_version": "1.6"}, "--checkpoint-version '1.6': choose 1.5, 1.4 or 1.2"),
    ({"dtype": "bf16"}, "choose keep, bfloat16, float16 or float32; did you mean"),
    ({"digests": "All"}, "did you mean all?"),
    ({"io": "nmap"}, "did you mean mmap?"),
    ({"tp": "4"}, "--tp '4' is not a whole number"),
    ({"tp": True}, "--tp 'True' is not a whole number"),
    ({"tp": 0}, "--tp 0: it is at least 1"),
    ({"workers": 0}, "--workers 0: it is at least 1"),
    ({"verify": "yes"}, "--verify 'yes' is not true or false"),
    ({"max_memory": "much"}, "'much' is not a size"),
    ({"max_memory": "0"}, "'0' is not a size"),
    ({"max_memory": -5}, "--max-memory"),
    ({"tokenizer": ""}, "--tokenizer: the path is empty"),
    ({"allow": [3]}, "--allow"),
    ({"bogus": 1}, "unexpected keyword argument 'bogus'"),
    ({"tensor_paralel": 1, "max_memry": 1}, "unexpected keyword"),
    ({"max_memry": 1}, "did you mean max_memory?")])
def test_a_wrong_choice_is_a_usage_error(tmp_path, choice, words):
    with pytest.raises(UsageError) as refused:
        api.plan(tmp_path, **choice)
    assert words in str(refused.value)


def test_all_wrong_choices_are_named_at_once(tmp_path):
    with pytest.raises(UsageError) as refused:
        api.plan(tmp_path, tp=0, rope="left", dtype=3)
    assert len(str(refused.value).splitlines()) == 3


@pytest.mark.parametrize("choice", [{"sample": 0}, {"sample": 1.5}, {"sample": "0%"}, {"seed": -1}, {"quick": 1}])
def test_a_wrong_scope_of_a_comparison_is_a_usage_error(tmp_path, choice):
    with pytest.raises(UsageError, match="--" + next(iter(choice))):
        api.verify(tmp_path, tmp_path, **choice)


@pytest.mark.parametrize("choice", [{"tokens": 1}, {"tolerance": 0}, {"tolerance": float("nan")}, {"dtype": "int8"}])
def test_a_wrong_forward_pass_is_a_usage_error(tmp_path, choice):
    with pytest.raises(UsageError, match="--" + next(iter(choice))):
        api.plan_forward(tmp_path, tmp_path, **choice)


def test_one_name_is_not_taken_letter_by_letter():
    assert Options.of(source="x", allow="rope_scaling").allow == ("rope_scaling",)
    assert VerifyOptions.of(sample="10%", edited="config.yaml") == VerifyOptions(sample=0.1, edited=("config.yaml",))
