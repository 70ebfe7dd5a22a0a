"""Katakomba's own readers and IQL update, from a checkout of it, for benchmark.py's side-by-side rows.

Its packages need not be installed: what is timed is taken out of the checkout's files. Its picture renderer is a C++
extension that has to be built; the update is therefore timed on ready pictures, without reading and rendering, which
favours Katakomba.
"""

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List

import numpy as np
import torch
import torch.nn as nn

from custom_nethack_pomdp import BLOCK

SCREEN_SHAPE = (3, 108, 108)  # katakomba/utils/render.py: 18 x 18 cells of 6 x 6 pixels
IQL = "algorithms/small_scale/iql_chaotic_lstm.py"


def check_checkout(folder: str) -> Path:
    """Raises ValueError if the folder is no checkout of Katakomba."""
    root = Path(folder)
    for name in (IQL, "katakomba/nn/chaotic_dwarf.py", "katakomba/utils/datasets/small_scale_buffer.py"):
        if not (root / name).is_file():
            raise ValueError(f"{folder} is no checkout of https://github.com/corl-team/katakomba: it has no {name}")
    return root


def write_hdf5(path: Path, games: Any, chosen: List[int]) -> int:
    """These games of a chunk store in Katakomba's layout, gzip as theirs; -> frames."""
    import h5py

    frames = 0
    with h5py.File(path, "w") as file:
        for game in chosen:
            store, number = games.places[game]
            length = int(store.frames[number])
            blocks = [store.block(number, index) for index in range(-(-length // BLOCK))]
            at, values = store.rewards(number)
            rewards, dones = np.zeros(length, np.int32), np.zeros(length, bool)
            rewards[at], dones[-1] = np.maximum(values, 0), True
            columns = {"tty_chars": np.concatenate([block.chars for block in blocks]),
                       "tty_colors": np.concatenate([block.colors for block in blocks]),
                       "tty_cursor": np.concatenate([block.cursor for block in blocks]).astype(np.int16),
                       "actions": np.concatenate([block.actions for block in blocks]).astype(np.int16),
                       "rewards": rewards, "dones": dones}  # fmt: skip
            group = file.create_group(str(game))
            for name, column in columns.items():
                group.create_dataset(name, data=column, compression="gzip")
            frames += length
    return frames


def open_buffer(root: Path, folder: Path, character: str, mode: str, rows: int, steps: int) -> Any:
    """Its SequentialBuffer over data-<character>-any.hdf5 in `folder`; mode is 'compressed' (gzip) or 'memmap'."""
    os.environ["KATAKOMBA_DATA_DIR"], os.environ["KATAKOMBA_CACHE_DIR"] = str(folder), str(folder / "cache")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    small_scale: Any = importlib.import_module("katakomba.utils.datasets.small_scale")
    buffer = importlib.import_module("katakomba.utils.datasets.small_scale_buffer")
    roles = importlib.import_module("katakomba.utils.roles")
    small_scale.DATA_PATH, small_scale.CACHE_PATH = str(folder), str(folder / "cache")  # read from the environment at import
    role, race, align = character.split("-")
    dataset = small_scale.NLDSmallDataset(roles.Role(role), roles.Race(race), roles.Alignment(align), mode=mode)
    return buffer.SequentialBuffer(dataset, batch_size=rows, seq_len=steps, add_next_step=True)


def iql_pieces(root: Path) -> Dict[str, Any]:
    """Critic, iql_loss and soft_update out of its IQL script (whose imports need packages that are of no use here)."""
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    encoders = importlib.import_module("katakomba.nn.chaotic_dwarf")
    names = {"Critic", "iql_loss", "soft_update", "asymmetric_l2_loss", "filter_wd_params"}
    tree = ast.parse((root / IQL).read_text(encoding="utf-8"))
    chosen = [node for node in tree.body if getattr(node, "name", None) in names]
    if {getattr(node, "name", None) for node in chosen} != names:
        raise ValueError(f"{root / IQL} does not define {', '.join(sorted(names))}")
    parts = ("TopLineEncoder", "BottomLinesEncoder", "ScreenEncoder")
    space: Dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "SCREEN_SHAPE": SCREEN_SHAPE, "LSTM_HIDDEN": Any,
                             "UPDATE_INFO": Any,
                             **{name: vars(__import__("typing"))[name] for name in ("Any", "Dict", "List", "Optional", "Tuple")},
                             **{name: getattr(encoders, name) for name in parts}}  # fmt: skip
    exec(compile(ast.Module(chosen, []), str(root / IQL), "exec"), space)
    return space


def iql_update(root: Path, rows: int, steps: int, device: str) -> Callable[[], float]:
    """A function that does one update of its IQL at its defaults and returns the transitions. As in its `train`: fp16
    autocast and GradScaler on CUDA, float32 on a CPU; states carried; no gradient clipping."""
    from copy import deepcopy

    pieces = iql_pieces(root)
    critic = pieces["Critic"](action_dim=121, rnn_hidden_dim=2048, rnn_layers=2).to(device)
    target = deepcopy(critic)
    no_decay, decay = pieces["filter_wd_params"](critic)
    optimizer = torch.optim.AdamW([{"params": no_decay}, {"params": decay}], lr=3e-4, weight_decay=0.0)
    cuda = device.startswith("cuda")
    scaler = torch.amp.GradScaler("cuda", enabled=cuda)
    shape, random = (rows, steps + 1), np.random.default_rng(0)
    batch = {name: torch.as_tensor(array, dtype=torch.float, device=device) for name, array in {
        "tty_chars": random.integers(32, 127, size=(*shape, 24, 80)),
        "screen_image": random.integers(0, 256, size=(*shape, *SCREEN_SHAPE)),
        "actions": random.integers(0, 121, size=shape), "rewards": random.normal(size=shape),
        "dones": np.zeros(shape)}.items()}  # fmt: skip
    carried: Dict[str, Any] = {"states": [None] * 3, "previous": torch.zeros((rows, 1), dtype=torch.long, device=device)}

    def update() -> float:
        actions = batch["actions"]
        with torch.autocast("cuda", dtype=torch.float16, enabled=cuda):
            obs, following = ({name: batch[name][:, part].contiguous() for name in ("tty_chars", "screen_image")}
                              for part in (slice(0, -1), slice(1, None)))  # fmt: skip
            obs["prev_actions"] = torch.cat([carried["previous"], actions[:, :-2].long()], dim=1)
            following["prev_actions"] = actions[:, :-1].long()
            loss, *states, _ = pieces["iql_loss"](
                critic=critic, target_critic=target, obs=obs, next_obs=following, actions=actions[:, :-1], rewards=batch["rewards"][:, :-1],
                dones=batch["dones"][:, :-1], rnn_states=carried["states"][0], target_rnn_states=carried["states"][1],
                next_rnn_states=carried["states"][2], expectile_tau=0.8, temperature=1.0, gamma=0.999)  # fmt: skip
        carried["states"] = [[part.detach() for part in state] for state in states]
        carried["previous"] = actions[:, -2, None].long()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        pieces["soft_update"](target, critic, tau=0.005)
        return rows * steps

    return update
