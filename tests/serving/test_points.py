"""The 26 points that clients of OpenAI's chat completions rely on, and the tests that hold each of them.

The list says what is checked where; a test that is renamed or lost makes this file fail.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

POINTS: dict[int, tuple[str, str]] = {
    1: ("routes, models, health, metrics, version", "transport: routes unknown_model metrics_are_prometheus_text"),
    2: (
        "bodies that are no JSON, other content types, too large, too slow; long heads",
        "transport: broken_bodies other_content_types bodies_are_limited_while_they_are_read a_slow_body_is_given_up "
        "long_heads",
    ),
    3: ("keys on every route but health, compared in constant time", "transport: keys each_key_has_its_own_memory"),
    4: ("request ids, on errors too", "transport: request_ids"),
    5: ("no other origin, no other name", "transport: no_other_origin other_names_of_this_machine"),
    6: (
        "the forms of messages, calls and results among them",
        "content: messages_that_are_taken messages_that_are_refused pictures_in_all_roles order_of_texts_and_pictures "
        "tools: results_go_back_and_tools_may_be_left_out a_picture_in_a_result_is_refused",
    ),
    7: ("the forms of pictures", "content: every_form_of_a_picture_is_the_same_picture what_is_no_picture"),
    8: ("formats, modes, sizes", "content: formats other_formats_are_refused low_detail_is_a_smaller_picture"),
    9: ("too much", "content: too_many_pictures longer_than_the_model too_many_messages_and_parts"),
    10: (
        "typed control tokens bind nothing",
        "special_tokens: typed_tokens_bind_nothing the_answer_does_not_depend_on_how_a_token_is_spelled "
        "tool_templates: no_string_of_a_tool_or_a_call_becomes_a_control_token",
    ),
    11: (
        "temperature, seed, top_p, lengths and their bounds",
        "sampling: temperature_zero_is_always_the_same seeds top_p_zero_is_greedy numbers_out_of_bounds "
        "the_newer_name_for_the_length_wins",
    ),
    12: ("n", "sampling: several_answers streaming: several_answers_in_one_stream"),
    13: ("stop", "sampling: stops stops_in_streams"),
    14: ("logprobs", "sampling: logprobs logprobs_of_streams_are_the_same logprobs_are_those_of_the_model"),
    15: ("penalties and logit_bias", "sampling: penalties logit_bias a_placeholder_cannot_be_asked_for"),
    16: (
        "response_format",
        "sampling: text_is_a_format json_objects json_schemas formats_that_are_refused "
        "without_the_library_what_cannot_be_promised_is_refused",
    ),
    17: (
        "tools",
        "tools: calls_of_the_models_own_choice several_calls_or_only_one arguments_are_streamed_while_they_are_written "
        "a_call_is_demanded text_that_spells_a_call_is_text_where_a_token_opens_calls a_template_without_tools_says_so "
        "what_is_wrong_is_told tool_templates: text_and_ids_equal_transformers",
    ),
    18: ("other fields ignored or refused", "sampling: fields_that_are_ignored fields_that_are_refused"),
    19: ("the form of a stream", "streaming: the_form_of_a_stream"),
    20: ("deltas are the whole, no character is cut", "streaming: the_form_of_a_stream characters_are_never_cut"),
    21: ("errors of streams", "streaming: bad_requests_have_a_status_not_a_stream an_error_in_a_stream_is_an_event"),
    22: ("signs of life", "streaming: silence_is_filled"),
    23: ("usage", "streaming: usage the_form_of_a_stream"),
    24: (
        "clients that go away",
        "streaming: a_client_that_goes_away_stops_the_computation a_client_that_goes_away_while_it_waits "
        "every_model: who_leaves_stops_the_computation",
    ),
    25: ("errors tell no secret", "transport: errors_do_not_repeat_what_was_sent what_fails_inside_says_nothing"),
    26: (
        "codes that clients can act on",
        "clients: errors_become_the_clients_classes "
        "reliability: a_full_queue_says_so_at_once_and_a_retry_succeeds health_turns_red_when_the_engine_dies",
    ),
}


def names_in(name: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / f"test_{name}.py").read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", range(1, 27))
def test_a_point_has_its_tests(number: int) -> None:
    words, listed = POINTS[number]
    assert words
    file, count = "", 0
    for word in listed.split():
        if word.endswith(":"):
            file = word[:-1]
        else:
            assert f"test_{word}" in names_in(file), (number, file, word)
            count += 1
    assert count
