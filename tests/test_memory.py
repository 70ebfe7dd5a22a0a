# SPDX-License-Identifier: MIT
"""What the agent remembers of a game (`recall`): kills, and the corpses that it must not eat."""

import numpy as np
import pytest
import torch

import custom_nethack_pomdp as pomdp
from custom_nethack_pomdp import EAT, ESC, NO_FACTS, YES, recall

pytestmark = pytest.mark.usefixtures("one_thread")
NO = pomdp.nethack.ACTIONS.index(ord("n"))
HIDDEN = 16


# --- recorded games
@pytest.fixture(scope="module")
def recorded(recorded_games):
    """{folder: frames} of three games, in which the scripted player meets fresh and old corpses."""
    sources = [source for games in recorded_games.values() for source in games]
    chosen = {}
    for folder in ("mon-hum-neu-1-6", "val-hum-neu-1-0", "val-hum-neu-1-7"):
        (path,) = [source.path for source in sources if f"/{folder}/" in source.path]
        chosen[folder] = pomdp.read_ttyrec(path)
    return chosen


def replay(frames):
    """The facts and the action ruled out at each frame, as `vec_act` would have them."""
    facts = NO_FACTS
    seen = [(b"", 0)]
    history = []
    for screen, cursor in zip(frames.chars, frames.cursor):
        (begun,), seen = pomdp.games_begun(seen, screen[None])
        facts, ruled_out = recall(NO_FACTS if begun else facts, screen, cursor, seen[0][1])
        history.append((facts, ruled_out))
    return history


def test_old_corpses_in_recorded_games_are_refused_and_fresh_ones_are_not(recorded):
    refused = {}
    eaten = 0
    for folder, frames in recorded.items():
        for t, (_, ruled_out) in enumerate(replay(frames)):
            text = frames.chars[t, 0].tobytes().decode("latin1")
            if ruled_out == YES:
                monster = text.partition(" corpse here; eat it? ")[0].replace("There is a ", "")
                refused.setdefault(folder, []).append((t, monster))
                assert frames.actions[t] == NO, (folder, t)  # the player knew it, too
            elif "corpse here; eat it? [ynq]" in text:
                eaten += frames.actions[t] == YES
    assert refused == {  # two corpses lie at one place at 4047: a bat's and a giant bat's
        "mon-hum-neu-1-6": [
            (3999, "shrieker"),
            (4047, "bat"),
            (4048, "giant bat"),
            (4051, "bat"),
            (4052, "giant bat"),
            (4173, "gnome"),
            (4176, "gnome"),
            (4179, "gnome"),
            (4665, "bat"),
        ],
        "val-hum-neu-1-0": [(100, "kobold"), (103, "kobold")],
    }
    assert eaten > 50


def test_a_kill_before_more_is_remembered_where_the_hero_stands(recorded):
    found = 0
    for frames in recorded.values():
        on_hero = [frames.chars[t][tuple(at)] == ord("@") for t, at in enumerate(frames.cursor)]
        for t, (facts, _) in enumerate(replay(frames)):
            text = frames.chars[t, 0].tobytes()
            if b"You kill" not in text or b"--More--" not in text or not any(on_hero[t:]):
                continue
            found += 1
            (monster,) = pomdp.KILL.findall(text)
            assert not on_hero[t]  # but behind --More--
            after = t + on_hero[t:].index(True)
            assert facts.kills[monster][1:] == tuple(frames.cursor[after])
    assert found > 5


# --- a recorded screen with other messages on its top lines
HERE = (10, 30)


@pytest.fixture(scope="module")
def screen(recorded):
    """Frame 1000 of a game, its hero taken away."""
    frames = recorded["val-hum-neu-1-7"]
    chars = frames.chars[1000].copy()
    row, column = frames.cursor[1000]
    assert chars[row, column] == ord("@")
    chars[row, column] = ord(".")
    return chars


def show(screen, message, place=HERE):
    """The screen with a message, wrapped as the game does, and the cursor, for which a question
    and --More-- take it from the hero."""
    chars = screen.copy()
    chars[place] = ord("@")
    chars[0] = ord(" ")
    lines = [message] if len(message) < 80 else [message[:70].rpartition(" ")[0]]
    if len(message) >= 80:
        lines.append(message[len(lines[0]) + 1 :])
        chars[1] = ord(" ")
    for line, text in zip(chars, lines):
        line[: len(text)] = list(text.encode())
    asks = "?" in message or "--More--" in message
    return chars, (len(lines) - 1, len(lines[-1]) + 1) if asks else place


def offer(monster, article="a", verb="is", plural="", it="it"):
    return f"There {verb} {article} {monster} corpse{plural} here; eat {it}? [ynq] (n)"


def play(screen, *steps):
    """Each step is a message, its turn and, if it is not HERE, the hero's place. -> the action that
    the last one rules out."""
    facts = NO_FACTS
    ruled_out = None
    for message, turn, *place in steps:
        facts, ruled_out = recall(facts, *show(screen, "", *place), turn)  # walked there
        facts, ruled_out = recall(facts, *show(screen, message, *place), turn)
    return ruled_out


KILLED = "You kill the jackal!"
CASES = {
    "fresh": ([(KILLED, 100), (offer("jackal"), 149)], None),
    "old": ([(KILLED, 100), (offer("jackal"), 150)], YES),
    "a later kill": ([(KILLED, 10), (KILLED, 100), (offer("jackal"), 120)], None),
    "no kill seen": ([(offer("jackal"), 20)], YES),
    "another monster's": ([(KILLED, 100), (offer("jackalwere"), 101)], YES),
    "a pet's kill": ([("The jackal is killed!", 100), (offer("jackal"), 101)], YES),
    "a pet killed": ([("You kill the poor little dog!", 9), (offer("little dog"), 9)], None),
    "partly eaten": ([(KILLED, 100), (offer("partly eaten jackal"), 110)], None),
    "partly eaten, old": ([(KILLED, 100), (offer("partly eaten jackal"), 200)], YES),
    "blessed or cursed": ([(KILLED, 100), (offer("uncursed jackal", "an"), 110)], None),
    "two of a kind": ([(KILLED, 9), (offer("jackal", "2", "are", "s", "one"), 9)], None),
    "two of a kind, old": ([(KILLED, 9), (offer("jackal", "2", "are", "s", "one"), 90)], YES),
    "old above fresh": ([(KILLED, 9), (offer("newt"), 9)], YES),
    "fresh below old": ([(KILLED, 9), (offer("newt"), 9), (offer("jackal"), 9)], None),
    "undead": ([("You destroy the gnome zombie!", 9), (offer("gnome"), 9)], YES),
    "an adjective": (
        [("You kill the invisible black pudding!", 9), (offer("black pudding"), 9)],
        None,
    ),
    "a saddled one": ([("You kill the saddled pony!", 9), (offer("pony"), 9)], None),
    "a name with of": (
        [("You kill the acolyte of Mitra!", 9), (offer("acolyte of Mitra"), 9)],
        None,
    ),
    "capitals and hyphens": ([("You kill the Uruk-hai!", 9), (offer("Uruk-hai", "an"), 9)], None),
    "a named one": ([("You kill Fido!", 9), (offer("dog"), 9)], YES),
    "unseen": ([("You kill it!", 9), (offer("newt"), 9)], YES),
    "never rots": ([(offer("lichen"), 9000)], None),
    "a lizard": ([(offer("partly eaten lizard"), 9000)], None),
    "no corpse": ([("There is a food ration here; eat it? [ynq] (n)", 9)], None),
    "two kills at once": (
        [("You kill the newt!  You kill the jackal!", 9), (offer("newt"), 9)],
        None,
    ),
    "before --More--": (
        [(KILLED + "--More--", 9), ("The fox bites!", 9), (offer("jackal"), 9)],
        None,
    ),
    "shot along a diagonal": ([(KILLED, 9), (offer("jackal"), 15, (14, 26))], None),
    "shot along a corridor": ([(KILLED, 9), (offer("jackal"), 20, (10, 41))], None),
    "another jackal's": ([(KILLED, 9), (offer("jackal"), 20, (12, 41))], YES),
    "for sale, on two lines": (
        [(offer("partly eaten hill orc").replace(" here", " (for sale, 13 zorkmids) here"), 9)],
        YES,
    ),
    "e after a refusal": ([(offer("jackal"), 9), ("", 9)], EAT),
    "e when the hero has moved": ([(offer("jackal"), 9), ("", 10, (10, 31))], None),
    "e back at the old corpse": (
        [(offer("jackal"), 9), ("", 10, (10, 31)), ("", 11)],
        EAT,
    ),
    "e after a kill there": ([(offer("jackal"), 9), (KILLED, 10), ("", 11)], None),
    "e answers": ([(offer("jackal"), 9), ("What do you want to eat? [de or ?*]", 9)], None),
    "e after a fresh one": ([(KILLED, 9), (offer("jackal"), 9), ("", 9)], None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_ruled_out(screen, case):
    steps, expected = CASES[case]
    assert play(screen, *steps) == expected


def test_a_menu_over_the_message_line_changes_nothing(screen):
    facts, _ = recall(NO_FACTS, *show(screen, KILLED), 9)
    menu = screen.copy()
    menu[:, 20:] = ord(" ")
    for row, text in enumerate((b"Comestibles", b"e - a food ration", b"(end)")):
        menu[row, 40 : 40 + len(text)] = list(text)
    menu[HERE] = ord("@")  # beside the menu
    assert recall(facts, menu, (2, 46), 10) == (facts, None)


def test_a_question_in_sight_after_its_answer_is_no_question(screen):
    """ESC leaves it there, and the cursor goes back to the hero: y is a step then."""
    chars, cursor = show(screen, offer("jackal"))
    facts, ruled_out = recall(NO_FACTS, *show(screen, ""), 9)
    assert recall(facts, chars, HERE, 9) == (facts, None)
    facts, ruled_out = recall(facts, chars, cursor, 9)
    assert ruled_out == YES
    assert recall(facts, chars, HERE, 9) == (facts, EAT)


# --- acting
def actor(**algorithm):
    """A small model that always wants to eat, and answers y."""
    torch.manual_seed(0)
    config = pomdp.TrainConfig(
        rnn_hidden_dim=HIDDEN, benchmark_sizes=False, algorithm={"head_dim": 4, **algorithm}
    )
    model = pomdp.make_algorithm(config, torch.device("cpu")).model.eval()
    torch.nn.init.zeros_(model.policy.weight)
    torch.nn.init.zeros_(model.policy.bias)
    torch.nn.init.zeros_(model.named.weight)
    torch.nn.init.zeros_(model.named.bias)
    model.policy.bias.data[YES] = 40.0
    model.policy.bias.data[EAT] = 80.0
    return model


def act(model, state, *shown, previous=0):
    """Actions of the slots that show these screens (chars, cursor)."""
    obs = pomdp.empty_observations(len(shown))
    obs["tty_chars"][:] = [chars for chars, _ in shown]
    obs["tty_cursor"][:] = [cursor for _, cursor in shown]
    obs["prev_actions"] = np.full(len(shown), previous)
    return model.vec_act(obs, state)


def with_turn(screen, turn):
    chars = screen.copy()
    text = f"Dlvl:1 $:0 HP:14(14) Pw:5(5) AC:4 Xp:1/0 T:{turn}"
    chars[23] = list(text.encode().ljust(80))
    return chars


def test_slots_share_no_facts_and_a_refused_corpse_is_left(screen):
    model = actor()
    model.policy.bias.data[EAT] = 0.0
    early, late = with_turn(screen, 100), with_turn(screen, 120)
    _, state = act(model, None, show(early, KILLED), show(early, "The jackal bites!"))
    actions, state = act(model, state, *[show(late, offer("jackal"))] * 2)
    assert actions.tolist() == [YES, ESC]
    assert [facts.refused for facts in state.facts] == [None, HERE]
    model.policy.bias.data[EAT] = 80.0
    actions, state = act(model, state, *[show(late, "")] * 2)
    assert actions.tolist() == [EAT, YES]  # what it wants most, and what it wants next
    actions, _ = act(model, state, *[show(late, "", (10, 31))] * 2)
    assert actions.tolist() == [EAT, EAT]


def test_a_new_game_remembers_nothing(screen):
    model = actor()
    _, state = act(model, None, show(with_turn(screen, 100), KILLED))
    _, going_on = act(model, state, show(with_turn(screen, 101), ""))
    _, begun = act(model, state, show(with_turn(screen, 1), ""))
    _, told = act(
        model, state, show(with_turn(screen, 101), ""), previous=model.no_action
    )  # by our own loop
    assert going_on.facts[0].kills == {b"jackal": (100, *HERE)}
    assert begun.facts[0].kills == told.facts[0].kills == {}
    assert state.facts[0].kills == {b"jackal": (100, *HERE)}  # the state before is as it was


def test_it_can_be_turned_off(screen):
    model = actor(remember=False)
    model.policy.bias.data[EAT] = 0.0
    actions, state = act(model, None, show(screen, offer("jackal")))
    assert actions.tolist() == [YES]
    assert state.facts == [NO_FACTS]
    with pytest.raises(ValueError, match="remember must be bool in"):
        pomdp.awr_config({"remember": 2})
