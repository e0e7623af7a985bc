"""Faults of the reference code of this family, each with the test that shows we do not have it; and what must hold.

The numbers are those of the project's notes on the reference code: B of LAVIS, H of transformers' classes, F of
OpenFlamingo, M of MiniGPT-4 and MiniGPT-5, T of checks that prove nothing. Not here: those of systems that this package
does not hold (H4 and H8 Chameleon, H6's class Mllama, H7 Florence-2, H9 Fuyu; L LEO, V Florence-VL, E Eagle, U Emu3).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
BUGS, TEXT = "parity/test_bridge_bugs.py", "parity/test_query_text.py"
TRAPS, LAVIS = "parity/test_flamingo_traps.py", "parity/test_lavis.py"
FAULTS: dict[str, tuple[str, str, str]] = {  # number → (what is wrong there, file, test)
    "T1": ("queries that begin at 0", "parity/test_qformer.py", "test_first_gradient_of_the_queries_is_of_usual_size"),
    "T3": ("closed gates hide the blocks", "parity/test_cross_attention.py", "test_first_step_moves_gates_only"),
    "T7": ("dropout once for two tasks", "parity/test_qformer.py", "test_dropout_runs_in_training_only"),
    "B1": ("a batch of one collapses", TEXT, "test_matching_and_contrast_are_those_of_transformers"),
    "B2": ("positives drawn as negatives", TEXT, "test_a_step_of_one_pair_has_no_negatives"),
    "B2, equal pairs": ("equal texts called wrong", TEXT, "test_equal_texts_and_pictures_are_no_negatives"),
    "B3": ("similarities overwritten", TEXT, "test_nothing_is_changed_after_the_loss"),
    "B4": ("a temperature that passes 0", TEXT, "test_a_cold_temperature_is_held"),
    "B4, ranks": ("no gradient across ranks", "recipes/test_blip2_stage1.py", "test_two_ranks_take_the_step_of_one"),
    "B5": ("perceptrons of queries stay random", LAVIS, "test_the_first_stage_begins_with_bert"),
    "B6": ("rates move once an epoch", BUGS, "test_rates_follow_steps_not_epochs"),
    "B7": ("Flan-T5 with its own GELU", BUGS, "test_flan_t5_runs_with_the_exact_gelu"),
    "B8": ("the opening token is learned", BUGS, "test_only_the_answer_and_its_end_are_learned"),
    "B9": ("pads before the text", BUGS, "test_padding_never_stands_between_a_picture_and_its_text"),
    "B10": ("sum or mean by the model's name", "parity/test_rank.py", "test_sums_and_means_are_those_of_transformers"),
    "B11": ("one of two sources is augmented", TRAPS, "test_f7_pictures_are_not_changed_by_chance"),
    "B12": ("</s> opens Vicuna in code", BUGS, "test_vicuna_is_opened_by_what_its_tokenizer_names"),
    "B13": ("a lost text half", LAVIS, "test_a_second_stage_without_its_text_half_is_one_clear_error"),
    "B14": ("texts cut on either side", "parity/test_blip2_hf.py", "test_the_instruction_matters_and_is_not_cut"),
    "H1": ("no writing, no temperature", TEXT, "test_the_first_stage_is_the_published_sum"),
    "H2": ("ids cut off for a picture", BUGS, "test_the_text_is_not_cut_for_the_place_of_a_picture"),
    "H2, no mask": ("matching needs a mask", TEXT, "test_padding_of_either_side_changes_nothing"),
    "H3": ("pads after the picture", BUGS, "test_padding_never_stands_between_a_picture_and_its_text"),
    "H5": ("labels crash with added tokens", "parity/test_idefics_hf.py", "test_gradients"),
    "H6": ("blind rows get a mixture", TRAPS, "test_f1_h6_no_picture_no_mixture"),
    "F1": ("text sees later pictures", "parity/test_cross_attention.py", "test_text_before_a_picture_does_not_see_it"),
    "F2": ("ids become floats", TRAPS, "test_f2_ids_stay_ids"),
    "F3": ("clipped before it is whole", "recipes/test_loop.py", "test_gradients_are_clipped_once_and_whole"),
    "F3, skipped": (
        "a loss that is no number is skipped",
        "recipes/test_loop.py",
        "test_a_loss_that_is_no_number_stops_and_names_the_samples",
    ),
    "F4": ("decay of gates and norms", TRAPS, "test_f4_decay_is_for_matrices"),
    "F4, rows": ("a mask that is lost", "recipes/test_rows.py", "test_only_the_rows_learn_under_decay"),
    "F5": ("patches after the last norm", TRAPS, "test_f5_patches_before_the_last_norm"),
    "F6": ("one inner width", TRAPS, "test_f6_inner_width_is_a_choice"),
    "F7": ("mirrored pictures", TRAPS, "test_f7_pictures_are_not_changed_by_chance"),
    "M1": ("$$ is masked", BUGS, "test_dollars_are_text"),
    "M2": ("an opening in every turn", BUGS, "test_the_opening_stands_once_in_many_turns"),
    "M3": ("strips, not squares", "parity/test_minigpt.py", "test_strips_are_four_patches_of_a_row"),
    "M4": ("what is frozen", "recipes/test_bridge_recipes.py", "test_minigpt4_learns_one_layer"),
    "M5": ("frozen rows decay", "recipes/test_rows.py", "test_only_the_rows_learn_under_decay"),
    "M6": ("states off by one", "parity/test_vokens.py", "test_states_that_predict_the_vokens_are_read"),
    "M7": ("0 goes through the first layer", "parity/test_vokens_objective.py", "test_pictures_without_words"),
}

CROSS, HF = "parity/test_cross_attention.py", "parity/test_blip2_hf.py"
STAGE_1 = "recipes/test_blip2_stage1.py"
SHOWN: dict[str, tuple[tuple[str, str], ...]] = {  # what holds → where that is shown
    "one masked pass is the published two": (
        ("parity/test_qformer.py", "test_unimodal_pass_is_two_passes"),
        ("parity/test_qformer.py", "test_causal_pass_is_the_published_two_passes"),
        (TEXT, "test_the_first_stage_is_the_published_sum"),
    ),
    "a batch of one": (
        (TEXT, "test_matching_and_contrast_are_those_of_transformers"),
        ("parity/test_qformer.py", "test_queries_alone_are_those_of_blip2"),
    ),
    "padded text": (
        ("parity/test_qformer.py", "test_padding_of_the_instruction_changes_nothing"),
        (TEXT, "test_padding_of_either_side_changes_nothing"),
        (CROSS, "test_padded_and_packed_are_alone"),
    ),
    "two pictures": ((BUGS, "test_two_pictures_stand_before_one_opening"), (CROSS, "test_which_picture_is_seen")),
    "text before the first picture": (
        (BUGS, "test_text_before_the_first_picture"),
        (CROSS, "test_text_before_a_picture_does_not_see_it"),
    ),
    "two ranks are one": ((STAGE_1, "test_two_ranks_take_the_step_of_one"), (STAGE_1, "test_a_rank_without_a_sample")),
    "a resumed run ends in the same bits": ((STAGE_1, "test_a_resumed_run_ends_in_the_same_bits"),),
    "an instruction that is too long": ((HF, "test_the_instruction_matters_and_is_not_cut"),),
    "more pictures than shots allow": (("recipes/test_flamingo.py", "test_too_many_shots_are_refused"),),
    "a second stage without its text half": ((LAVIS, "test_a_second_stage_without_its_text_half_is_one_clear_error"),),
    "answers ranked by sum and mean": (("parity/test_rank.py", "test_sums_and_means_are_those_of_transformers"),),
    "beams with a length penalty": ((HF, "test_same_text"), ("parity/test_idefics_hf.py", "test_same_text")),
    "frozen parts stand still": (
        ("recipes/test_flamingo.py", "test_frozen_stand_still_and_the_rest_is_proved"),
        ("recipes/test_bridge_recipes.py", "test_minigpt5_learns_its_tokens_and_their_mapper"),
        ("recipes/test_bridge_recipes.py", "test_video_llama_learns_what_stands_over_the_frames"),
    ),
    "formulas in float64": (
        (CROSS, "test_openflamingo_is_the_published_formula"),
        ("parity/test_minigpt.py", "test_two_levels_are_video_llamas"),
        ("parity/test_vokens_objective.py", "test_the_sum_by_its_formula"),
    ),
}


@pytest.mark.parametrize(("file", "name"), sorted({place for places in SHOWN.values() for place in places}))
def test_what_must_hold_is_shown(file: str, name: str):
    there(file, name)


@pytest.mark.parametrize("number", FAULTS)
def test_every_fault_has_its_test(number: str):
    _, file, name = FAULTS[number]
    there(file, name)


def there(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)
