"""Old and new file on the same data: batches, 50 losses, held-out loss, 12 games."""
import sys, importlib.util, json, hashlib, os
os.environ["WANDB_MODE"]="disabled"
path, out = sys.argv[1], sys.argv[2]
data = sys.argv[3] if len(sys.argv) > 3 else "tests/data/nle_data"
import custom_nethack_pomdp as P


def main():

    import torch, numpy as np
    torch.set_num_threads(1)
    chars = "mon-hum-neu,val-hum-neu,ran-hum-neu" if "tests" in data else "mon-hum-neu"
    common = dict(character=chars, data_path=data, store_path=out+".stores", checkpoints_path=out+".runs", update_steps=50, batch_size=16, seq_len=16,
      log_every=1, eval_every=50, eval_episodes=12//len(chars.split(",")), eval_processes=4, eval_max_steps=400, eval_heldout_frames=4096, rnn_hidden_dim=64, precision="fp32", learning_rate=1e-3)
    if hasattr(P, "validate_config") and hasattr(P, "coerce"): P.validate_config = lambda c: None
    c = P.TrainConfig(**common)
    digest = hashlib.sha256()
    if hasattr(P, "load_data"):
        d = P.load_data(c); l = P.ChunkLoader(d.games, d.training, c, 16, d.reward_scale)
    else:
        g = P.Games([P.open_or_build_store(c.data_path, c.store_path, n) for n in c.characters]); h = g.heldout(.1); t = np.flatnonzero(~h)
        l = P.ChunkLoader(g, t, 16, 16, 42, g.reward_scale(t, c.gamma), 10.0)
    for step in [0,1,2,3,50,l.plan.steps-1,l.plan.steps, 3*l.plan.steps+5]:
        b = l.batch_at(step)
        for k in sorted(b):
            a = b[k].numpy()
            if k in ("tty_chars","tty_colors","tty_cursor","blstats"): a = a*b["mask"].numpy().reshape(*b["mask"].shape, *([1]*(a.ndim-2)))
            digest.update(k.encode()+np.ascontiguousarray(a).tobytes())
    folder = P.train(c)
    rows = [json.loads(x) for x in open(folder/"metrics.jsonl")]
    res = {"batches": digest.hexdigest(), "loss": [r["loss"] for r in rows if "loss" in r], "last": {k: v for k, v in rows[-1].items() if not k.startswith("times")},
      "train": {k: v for k, v in [r for r in rows if "loss" in r][-1].items() if not k.startswith(("times","charts"))}}
    json.dump(res, open(out, "w"))
if __name__ == "__main__":
    main()
