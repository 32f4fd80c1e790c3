"""Conversations become ids and masks: what the assistant says is learned, what was met on the way is counted."""

from typing import Any

import pytest
from datasets import Dataset
from tokenising import tokenize_preference, tokenize_supervised, tokenize_unpaired
from tokenizers_for_tests import CHATML, TOOLS, byte_tokenizer, metaspace_tokenizer, styled_tokenizer

USER = {"role": "user", "content": "hi"}
YO = {"role": "assistant", "content": "yo"}
BYE = {"role": "assistant", "content": "bye"}
TOLD = {"role": "tool", "content": "SECRET"}


def calling(arguments: Any = None) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": 1} if arguments is None else arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>'


def learned(tokenizer: Any, rows: Any, **options: Any) -> list[list[str]]:
    """The runs of learned tokens of each row as text."""
    made, _ = tokenize_supervised(rows, tokenizer, **options)
    texts = []
    for row in made:
        runs: list[list[int]] = [[]]
        for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True):
            if counts:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        texts.append([tokenizer.decode(run) for run in runs if run])
    return texts


AGENTIC = {"prompt": [USER], "completion": [calling(), TOLD, BYE]}


def test_tool_results_inside_a_completion_are_not_learned_unless_asked_for() -> None:
    tokenizer = byte_tokenizer(TOOLS)
    assert learned(tokenizer, [AGENTIC]) == [[CALL, "bye<|im_end|>"]]
    ((whole,),) = learned(tokenizer, [AGENTIC], learn_tool_results=True)
    assert whole.startswith(CALL + "\n<|im_start|>tool\nSECRET")
    (everything,) = learned(tokenizer, [AGENTIC], completion_only_loss=False)
    assert "SECRET" in everything[0]


def test_what_users_say_inside_a_completion_is_not_learned() -> None:
    row = {"prompt": [USER], "completion": [YO, USER, BYE]}
    assert learned(byte_tokenizer(), [row, row]) == [["yo<|im_end|>", "bye<|im_end|>"]] * 2
    tokenizer = metaspace_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    assert learned(tokenizer, [{"prompt": [USER], "completion": [YO, USER, BYE]}]) == [
        ["assistant: yo</s>", "assistant: bye</s>"]
    ]


def test_a_message_without_weight_is_not_learned_in_any_kind_of_row() -> None:
    tokenizer = byte_tokenizer()
    silent = {**YO, "weight": 0}
    assert learned(tokenizer, [{"messages": [USER, silent, USER, BYE]}], assistant_only_loss=True) == [
        ["bye<|im_end|>"]
    ]
    assert learned(tokenizer, [{"prompt": [USER], "completion": [silent, USER, BYE]}]) == [["bye<|im_end|>"]]
    values = [("human", "hi", 0), ("gpt", "yo", 0), ("human", "hi", None), ("gpt", "bye", 1)]
    shared = [{"from": who, "value": said, "weight": weight} for who, said, weight in values]
    assert learned(tokenizer, [{"conversations": shared}], assistant_only_loss=True) == [["bye<|im_end|>"]]


def test_nulls_are_kept_in_lists_of_rows_and_not_in_arrow() -> None:
    tokenizer = byte_tokenizer(TOOLS)
    rows = [{"messages": [USER, calling({"a": 1, "b": None})]}, {"messages": [USER, calling({"a": None, "b": 2})]}]
    said = ['{"a": 1, "b": null}', '{"a": null, "b": 2}'], ['{"a": 1}', '{"b": 2}']
    for data, arguments in ((rows, said[0]), (Dataset.from_list(rows), said[1])):
        assert learned(tokenizer, data, assistant_only_loss=True) == [
            [f'<tool_call>{{"name": "add", "arguments": {text}}}</tool_call><|im_end|>'] for text in arguments
        ]


@pytest.mark.parametrize("assistant_only", [True, False])
def test_what_was_met_is_counted_in_rows(assistant_only: bool) -> None:
    rows = [
        {"messages": [USER, {**YO, "reasoning_content": "Hm."}]},
        {"messages": [USER, calling('{"a": 1}')]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "yo"}]}]},
        {"messages": [USER, YO]},
    ]
    _, report = tokenize_supervised(rows, byte_tokenizer(TOOLS), assistant_only_loss=assistant_only)
    assert (report.unprinted_thoughts, report.decoded_arguments, report.joined_parts) == (1, 1, 1)
    assert (report.unprinted_text, report.unprinted_results, report.rewritten) == (0, 0, 0)
    tokenizer, ends = styled_tokenizer("handwritten_phi3")
    rows = [{"messages": [USER, calling(), TOLD, BYE]}]
    _, report = tokenize_supervised(rows, tokenizer, assistant_only_loss=assistant_only, ends=ends)
    assert (report.unprinted_results, report.spelled_tools, report.missing_eos) == (1, 1, 0)
    assert "the chat template does not print the results of tools in 1 of 4 messages" in report.findings


def test_other_parts_name_the_row() -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    rows = [{"messages": [USER, YO]}, {"messages": [image, YO]}]
    with pytest.raises(ValueError, match="row 1 of the train data set: message 0 has a part of kind 'image'"):
        tokenize_supervised(rows, byte_tokenizer())


def test_arguments_are_decoded_in_preferences_and_labelled_rows_too() -> None:
    tokenizer = byte_tokenizer(TOOLS)
    pair = {"prompt": [USER], "chosen": [calling('{"a": 1}')], "rejected": [calling({"a": 2})]}
    ((row,), report) = tokenize_preference([pair], tokenizer)
    assert tokenizer.decode(row["chosen_ids"]) == CALL
    assert tokenizer.decode(row["rejected_ids"]) == CALL.replace("1", "2")
    assert report.decoded_arguments == 1
    one = {"prompt": [USER], "completion": [calling('{"a": 1}')], "label": True}
    ((row,), _) = tokenize_unpaired([one], tokenizer)
    assert tokenizer.decode(row["completion_ids"]) == CALL


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_answers_end_by_the_templates_own_token(eos: str) -> None:
    tokenizer = byte_tokenizer(CHATML, eos=eos)
    _, report = tokenize_preference([{"prompt": [USER], "chosen": [YO], "rejected": [BYE]}], tokenizer)
    assert report.missing_eos == 0


def test_a_preference_keeps_its_system_message_where_the_template_drops_it_in_answered_conversations() -> None:
    tokenizer, _ = styled_tokenizer("mistral_nemo")
    prompt = [{"role": "system", "content": "Be brief."}, USER]
    ((row,), report) = tokenize_preference([{"prompt": prompt, "chosen": [YO], "rejected": [BYE]}], tokenizer)
    assert tokenizer.decode(row["prompt_ids"]) == "<s>[INST]Be brief.\n\nhi[/INST]"
    assert tokenizer.decode(row["chosen_ids"]) == "yo</s>"
    assert report.rewritten == 1
