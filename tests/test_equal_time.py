"Models of a chapter that trains them for the same time: the clock, the allowance, and trainings that are cut off."
import json

import pytest
import torch

from cxr_nb.core import seeded
from cxr_nb.studies.equal_time import Looks, allowance
from cxr_nb.train import fit
from small import Cut, Stop, same


class Line(torch.nn.Module):
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(3))
    def losses(self, batch, step=0): return {"loss": (self.w - batch["x"] - torch.randn(3)).square().mean()}


class Points:
    def __len__(self): return 12
    def __getitems__(self, positions): return {"x": torch.ones(len(positions), 3)*torch.tensor(positions)[:, None]}


def train(folder, steps, callbacks, **options):
    with seeded(0, "line"): line = Line()
    return fit(line, Points(), out=folder, steps=steps, batch_size=4, seed=0, callbacks=callbacks, progress=False, checkpoint_seconds=1e9, **options)


def looked(model, step, seconds):
    row = dict(step=step, seconds=seconds, w=model.w.tolist()); model.w.data += 100; torch.randn(5)
    return [row]


def test_looking_does_not_touch_the_training(tmp_path):
    looks = Looks([2, 6], looked); a, b = train(tmp_path/"looked", 6, [looks]), train(tmp_path/"not", 6, [])
    assert [r["step"] for r in looks.rows] == [2, 6] and 0 < looks.rows[0]["seconds"] < looks.rows[1]["seconds"] == looks.seconds
    assert looks.rows[1]["w"] == a.model.w.tolist() and same(a.model, b.model)


def test_a_training_that_was_cut_off_keeps_its_rows_and_its_clock(tmp_path):
    whole = Looks([2, 6], looked); train(tmp_path/"whole", 6, [whole])
    with pytest.raises(Stop): train(tmp_path/"cut", 6, [Looks([2, 6], looked), Cut()], checkpoint_every=1)
    again = Looks([2, 6], looked); h = train(tmp_path/"cut", 6, [again])
    assert h.resumed == 3 and [(r["step"], r["w"]) for r in again.rows] == [(r["step"], r["w"]) for r in whole.rows] and again.seconds > again.rows[0]["seconds"] > 0


def test_an_allowance_is_kept_and_one_without_a_step_is_refused(tmp_path):
    n = allowance(.2, train, tmp_path/"a", 6); assert n > 0 and json.loads((tmp_path/"a"/"allowance.json").read_text())["steps"] == n == allowance(.2, train, tmp_path/"a", 6)
    with pytest.raises(ValueError, match="begun with 0.2 s and now gets 9 s"): allowance(9., train, tmp_path/"a", 6)
    with pytest.raises(ValueError, match="b: a step takes .* give it more"): allowance(1e-9, train, tmp_path/"b", 6)
