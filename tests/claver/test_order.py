"""What is said of reversed and shuffled clips is what the model says of them, and no order reaches a frame average."""

import dataclasses
import json

import claver.evaluation.order
import pytest
import torch
from claver.data.datasets import TestDataset
from claver.data.lists import read_labels, read_list
from claver.data.motions import MOTIONS
from claver.evaluation.evaluate import Evaluation, class_probabilities, run_evaluation
from claver.evaluation.order import Order, evaluate_order, opposites_of, order, summarize
from claver.model import Claver, build_model
from claver.prompts.choice import choose_prompts
from claver.text import encode_prompts, tokens_of
from claver.weights.checkpoint import save_checkpoint
from small import small_config, small_model
from torch.nn import functional as F


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of two random models on the same videos, with time and without, and what was stored there."""
    folder = tmp_path_factory.mktemp("order")
    found = {}
    for name, changes in (
        ("kmct", {"attention": "kmct", "temporal_std": 1.0}),
        ("average", {"attention": "spatial", "temporal_embedding": False}),
    ):
        torch.manual_seed(0)
        large = {"logit_scale": 30.0, "token_std": 0.1, "position_std": 1.0}
        config = dataclasses.replace(
            small_config(folder, num_train=1, num_test=16, run=name), model=small_model(**large, **changes)
        )
        model = build_model(config.model).eval()
        classes = read_labels(config.data.labels)
        prompts = choose_prompts(config, classes).prompts
        (folder / name).mkdir()
        save_checkpoint(folder / name / "best.safetensors", model, config, classes, prompts)
        found[name] = (str(folder / name), config, model, tokens_of(prompts, model))
    return found


class Sensitive(Claver):
    """What it says is how the pixels change from the first frame to the last: of a random model it is nearly always the same."""

    def encode_video(self, video):
        times = torch.linspace(-1, 1, video.shape[1]) ** 3
        pixels = F.adaptive_avg_pool2d(video.flatten(0, 1), 4).unflatten(0, video.shape[:2]).flatten(2)  # (B, T, 48)
        projection = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
        return F.normalize(torch.einsum("t,btp,pe->be", times, pixels, projection), dim=-1)


def expected_classes(config, model, tokens, change):
    """Labels, and the class of each test video whose clips are changed one by one."""
    samples = read_list(config.data.test_list, config.data.root, 8)
    dataset = TestDataset(samples, 4, config.augment, num_clips=config.test.clips, num_crops=config.test.crops)
    text_features = encode_prompts(model, tokens)
    videos = [torch.stack([change(clip) for clip in dataset[i]["video"]]) for i in range(len(dataset))]
    found = [class_probabilities(model, video[None], text_features)[0].argmax() for video in videos]
    return torch.tensor([sample.label for sample in samples]), torch.stack(found)


def test_reversed_and_shuffled_clips_are_what_the_model_is_given(runs):
    _, config, model, tokens = runs["kmct"]
    model = Sensitive(model.clip).eval()
    found = evaluate_order(model, lambda m: run_evaluation(config, m, tokens), opposites_of(MOTIONS))
    labels, backwards = expected_classes(config, model, tokens, lambda clip: clip.flip(0))
    _, shuffled = expected_classes(config, model, tokens, lambda clip: clip[claver.evaluation.order._shuffled(clip)])
    _, forwards = expected_classes(config, model, tokens, lambda clip: clip)
    assert (backwards != forwards).any()  # so it matters
    assert (shuffled != forwards).any()
    assert found == Order(
        top1=(forwards == labels).double().mean().item(),
        reversed_opposite=(backwards == (labels ^ 1)).double().mean().item(),
        reversed_same=(backwards == labels).double().mean().item(),
        shuffled_same=(shuffled == labels).double().mean().item(),
        videos=16,
        opposites=16,
    )
    assert not model.training


def test_a_frame_average_says_the_same_in_any_order(runs):
    _, config, model, tokens = runs["average"]
    found = evaluate_order(model, lambda m: run_evaluation(config, m, tokens), opposites_of(MOTIONS))
    assert found.top1 == found.reversed_same == found.shuffled_same


def test_batches_do_not_change_what_is_shuffled(runs):
    _, config, model, tokens = runs["kmct"]
    shuffled = claver.evaluation.order._Reordered(Sensitive(model.clip), claver.evaluation.order._shuffled)
    said = []
    for batch in (1, 5):
        changed = dataclasses.replace(config, test=dataclasses.replace(config.test, batch_size=batch))
        said.append(run_evaluation(changed, shuffled, tokens).probabilities)
    torch.testing.assert_close(said[0], said[1], atol=1e-6, rtol=0)
    assert not torch.allclose(said[0], run_evaluation(config, shuffled.model, tokens).probabilities, atol=1e-3)
    clip = torch.randn(2, 3, 32, 32)
    assert claver.evaluation.order._shuffled(clip).tolist() == [1, 0]  # never the clip's own order
    assert claver.evaluation.order._shuffled(clip[:1]).tolist() == [0]


def test_shares_of_reversed_clips_are_of_classes_with_an_opposite():
    """Classes up, down and still; four clips: up, down, still, up."""
    labels = torch.tensor([0, 1, 2, 0])
    said = {"forwards": [0, 1, 2, 1], "_reversed": [1, 1, 0, 0], "_shuffled": [0, 1, 0, 0]}

    def evaluate(model):
        name = model.order.__name__ if isinstance(model, claver.evaluation.order._Reordered) else "forwards"
        return Evaluation(torch.eye(3)[said[name]], torch.eye(3)[said[name]], labels)

    model, opposites = build_model(small_model()), opposites_of(["up", "down", "still"], {"up": "down"})
    assert opposites == [1, 0, None]
    found = evaluate_order(model, evaluate, opposites)
    assert (found.top1, found.shuffled_same, found.videos, found.opposites) == (0.75, 0.75, 4, 3)
    assert found.reversed_opposite == pytest.approx(1 / 3)  # the first of three
    assert found.reversed_same == pytest.approx(2 / 3)
    first_unread = torch.eye(3)[said["forwards"]] * torch.tensor([[0.0], [1], [1], [1]])
    unread = Evaluation(first_unread, first_unread, labels)
    assert evaluate_order(model, evaluate, opposites, forwards=unread).top1 == 0.5  # a broken video counts as wrong
    with pytest.raises(ValueError, match="no test video is of a class that has an opposite"):
        evaluate_order(model, evaluate, [None, None, None])
    assert (
        evaluate_order(model, lambda m: evaluate(m) if m is not model else None, opposites, forwards=evaluate(model))
        == found
    )


def test_opposites_are_those_of_the_motions_unless_they_are_given():
    assert opposites_of(MOTIONS) == [1, 0, 3, 2, 5, 4, 7, 6]
    assert opposites_of(["growing", "waving", "shrinking"]) == [2, None, 0]
    assert opposites_of(["opening", "closing"], {"opening": "closing"}) == [1, 0]
    with pytest.raises(ValueError, match="opposites name 'shutting', which is none of the 2 classes"):
        opposites_of(["opening", "closing"], {"opening": "shutting"})


def test_runs_are_summarized_with_students_interval():
    def of(value):
        return Order(value, value / 2, 0.0, 1.0, 8, 8)

    summary = summarize([of(value) for value in (0.1, 0.2, 0.3, 0.4, 0.5)])
    assert summary["top1"]["mean"] == pytest.approx(0.3)
    assert summary["top1"]["interval"] == pytest.approx(0.19633, abs=1e-4)  # 2.7764 * .15811 / sqrt(5)
    assert summary["reversed_opposite"]["interval"] == pytest.approx(0.19633 / 2, abs=1e-4)
    assert summary["shuffled_same"] == {"mean": 1.0, "interval": 0.0, "values": [1.0] * 5}
    assert summarize([of(0.1)])["top1"]["interval"] is None
    quantiles = {1: 12.7062, 4: 2.7764, 9: 2.2622, 10: 2.2281, 30: 2.0423, 1000: 1.9623}  # of any table
    for freedom, quantile in quantiles.items():
        assert claver.evaluation.order._t95(freedom) == pytest.approx(quantile, abs=1e-3)


def test_runs_and_their_control_are_evaluated_and_written(runs, tmp_path, capsys):
    kmct, average = runs["kmct"][0], runs["average"][0]
    summary = order([kmct, f"{kmct}/best.safetensors"], control=[average], out=tmp_path / "order.json")
    stored = json.loads((tmp_path / "order.json").read_text())
    assert stored["summary"] == summary
    assert [one["checkpoint"] for one in stored["checkpoints"]["runs"]] == [kmct, f"{kmct}/best.safetensors"]
    assert summary["runs"]["top1"]["interval"] == 0
    assert summary["control"]["top1"]["interval"] is None
    assert summary["control"]["top1"]["mean"] == summary["control"]["reversed_same"]["mean"]
    lines = capsys.readouterr().out.splitlines()
    assert "runs (2)" in lines[-5]
    assert "control (1)" in lines[-5]
    assert lines[-3].startswith("reversed: the opposite class")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        order([])


def test_the_videos_may_lie_elsewhere(runs, tmp_path):
    folder, config, *_ = runs["kmct"]
    (tmp_path / "one.txt").write_text("videos/test_00003.mp4 0\n")
    data = dataclasses.replace(config.data, test_list=str(tmp_path / "one.txt"))
    order([folder], data=data, out=tmp_path / "order.json")
    assert json.loads((tmp_path / "order.json").read_text())["checkpoints"]["runs"][0]["videos"] == 1
