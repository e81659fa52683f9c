"""The texts of a training step cost less, and the step stays what it was: features, losses and gradients."""

import copy
import dataclasses
import os

import open_clip.model
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from claver import text as text_module
from claver.config import TrainConfig
from claver.model import build_model, freeze
from claver.prompts.build import tokenize
from claver.text import StepTexts, TrainingTexts, encode_prompts, group_sizes, share_texts, step_flops, text_lengths
from claver.training.step import contrastive_loss
from claver.training.train import train
from hypothesis import given
from hypothesis import strategies as st
from small import TEXT, VISION, small_config, small_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

NAMES = ["a cat", "two big dogs that run after a cat", "a bird", "nothing", "a very long way home"]
PROMPTS = [[template.replace("{}", name) for name in NAMES] for template in ("{}", "we see {}", "{} is here")]


def model_of_text(kind=open_clip.model.CustomTextCLIP, **text):
    torch.manual_seed(0)
    vision = open_clip.model.CLIPVisionCfg(**VISION)
    settings = open_clip.model.CLIPTextCfg(**(TEXT | {"context_length": 24, "width": 64, "layers": 2} | text))
    return kind(512, vision, settings).eval()  # of as many channels as CLIP's: values of their size


def tokens_for(clip, eos=None):
    tokens = tokenize(PROMPTS, context_length=clip.context_length)
    return tokens if eos is None else tokens.masked_fill(tokens == tokens.max(), eos)


def texts_of(model, prompts=PROMPTS, **settings):
    tokens = tokenize(prompts, context_length=model.clip.context_length)
    return TrainingTexts(model, tokens, Accelerator(cpu=True), **({"per_step": 2} | settings))


# ---- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (open_clip.model.CLIP, {}),
        (open_clip.model.CustomTextCLIP, {}),
        (open_clip.model.CLIP, {"pool_type": "eos", "eos_id": 7}),
        (open_clip.model.CustomTextCLIP, {"pool_type": "eos", "eos_id": 7}),
        (open_clip.model.CustomTextCLIP, {"proj_bias": True, "proj_type": "linear"}),
    ],
)
def test_a_causal_text_is_cut_at_its_end_and_its_feature_stays(kind, settings):
    clip = model_of_text(kind, **settings)
    tokens = tokens_for(clip, settings.get("eos_id")).flatten(0, 1)
    lengths = text_lengths(clip, tokens)
    assert lengths.tolist() == [int((row != 0).sum()) for row in tokens]  # the padding is 0
    for size in lengths.unique().tolist():
        some = tokens[lengths == size]
        features = StepTexts((some[:, :size],), torch.arange(len(some)), True, False).encode(clip)
        whole = F.normalize(clip.encode_text(some), dim=-1)
        assert (features - whole).abs().max() <= 1.2e-7
        if size > 3:  # cut before its end, it is another text
            other = StepTexts((some[:, : size - 1],), torch.arange(len(some)), True, False).encode(clip)
            assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}])
def test_a_text_that_sees_its_padding_is_encoded_whole(settings):
    clip = model_of_text(**settings)
    tokens = tokens_for(clip)
    assert (text_lengths(clip, tokens) == 24).all()
    model = build_model(small_model())
    model.clip.text = clip.text  # which the model then takes
    model.clip.encode_text = clip.encode_text
    expected = F.normalize(clip.encode_text(tokens.flatten(0, 1)), dim=-1).view(3, 5, -1)
    assert_close(encode_prompts(model, tokens), expected, rtol=0, atol=1e-6)
    texts = TrainingTexts(model, tokens, Accelerator(cpu=True), per_step=3)
    of_step = texts.of(torch.tensor([[0, 1, 2]]), torch.arange(5))
    assert {group.shape[1] for group in of_step.groups} == {24}
    assert_close(model.encode_text(of_step), expected, rtol=0, atol=1e-6)


def test_all_prompts_encoded_in_batches_are_those_encoded_whole():
    model = build_model(small_model(embed_dim=512))
    tokens = tokenize(PROMPTS, context_length=16)
    with torch.no_grad():
        assert_close(encode_prompts(model, tokens, batch_size=4), model.encode_text(tokens), rtol=0, atol=1.2e-7)
    assert model.training


def test_a_step_has_the_gradient_of_the_whole_texts():
    model = build_model(small_model())
    texts = texts_of(model)
    chosen = torch.tensor([2, 0])
    gradients = []
    video, target = torch.randn(2, 4, 3, 32, 32), torch.rand(2, 5).softmax(-1)
    for given_texts in (texts.tokens[chosen], texts.of(chosen[None], torch.arange(5))):
        model.zero_grad()
        contrastive_loss(model(video, given_texts), target).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, whole in gradients[0].items():
        assert (gradients[1][name] - whole).abs().max() <= 1e-5 * whole.abs().max(), name


def test_texts_can_be_one_group_as_towers_in_shares_need(monkeypatch):
    monkeypatch.setattr(text_module, "group_sizes", lambda lengths: [1] * len(lengths))
    model = build_model(small_model())
    chosen, classes = torch.tensor([[2, 0]]), torch.arange(5)
    many, one = (texts_of(model, one_group=choice).of(chosen, classes) for choice in (False, True))
    assert (len(many.groups), len(one.groups)) == (10, 1)
    assert_close(one.encode(model.clip), many.encode(model.clip), rtol=0, atol=1e-6)


# ---- grouping and dealing -------------------------------------------------------------------------------------------


def tokens_in(sizes, lengths, cost):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return sum(size * lengths[end - 1] + cost for size, end in zip(sizes, ends, strict=True))


def all_divisions(number):
    if not number:
        yield []
    for last in range(1, number + 1):
        for rest in all_divisions(number - last):
            yield [*rest, last]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8).map(sorted), st.integers(0, 9))
def test_groups_have_the_fewest_tokens(lengths, cost):
    sizes = group_sizes(lengths, cost)
    assert sum(sizes) == len(lengths)
    assert tokens_in(sizes, lengths, cost) == min(tokens_in(s, lengths, cost) for s in all_divisions(len(lengths)))


@given(st.lists(st.integers(1, 77), min_size=1, max_size=40), st.integers(1, 6))
def test_every_text_is_dealt_to_a_process_and_found_again(lengths, ranks):
    lengths = torch.tensor(lengths)
    dealt = [share_texts(lengths, ranks, rank) for rank in range(ranks)]
    gathered = torch.cat([share for share, _ in dealt])
    for share, places in dealt:
        assert (lengths[share].diff() >= 0).all()
        assert len(share) == -(-len(lengths) // ranks)
        assert gathered[places].tolist() == list(range(len(lengths)))
    work = [int(lengths[share].sum()) for share, _ in dealt]
    assert max(work) - min(work) <= lengths.max()


# ---- frozen towers, draws, classes ----------------------------------------------------------------------------------


def test_a_tower_that_is_not_trained_encodes_once(monkeypatch):
    model = build_model(small_model())
    freeze(model, "temporal")
    calls = []
    monkeypatch.setattr(
        text_module, "_encode_cut", lambda *args, real=text_module._encode_cut: calls.append(1) or real(*args)
    )
    texts = texts_of(model)
    video = torch.randn(2, 4, 3, 32, 32)
    for prompts in ([[0, 1]], [[2, 0]], [[1, 1]]):
        of_step = texts.of(torch.tensor(prompts), torch.tensor([0, 2, 4]))
        expected = model(video, texts.tokens[prompts[0]][:, [0, 2, 4]])
        assert_close(model(video, of_step), expected, rtol=0, atol=5e-6)  # scaled by 14
    assert len(calls) == 1
    assert "encoded once" in texts.describe((2, 4, 3, 32, 32))


def test_micro_batches_draw_with_replacement():
    model = build_model(small_model())
    generator = torch.Generator().manual_seed(0)
    texts = texts_of(model, per_step=3)
    assert all(sorted(texts.draw(generator)[0].tolist()) == [0, 1, 2] for _ in range(20))
    texts = texts_of(model, per_step=3, draws="microbatch")
    drawn = [texts.draw(generator)[0].tolist() for _ in range(200)]
    assert sum(len(set(row)) == 3 for row in drawn) / 200 == pytest.approx(2 / 9, abs=0.1)  # 3! of 3 ** 3
    assert torch.tensor(drawn).flatten().bincount().tolist() == pytest.approx([200] * 3, abs=40)
    generator.manual_seed(3)
    first = texts.draw(generator)
    assert torch.equal(first, texts.draw(generator.manual_seed(3)))
    same = torch.tensor([[1, 1, 0]])  # twice the same prompt
    assert_close(model.encode_text(texts.of(same, torch.arange(5))), model.encode_text(texts.tokens[same[0]]))


def test_a_step_has_the_classes_of_its_clips_and_others_at_random():
    model = build_model(small_model())
    texts = texts_of(model, classes_per_step=3)
    label, generator = torch.tensor([4, 1, 4]), torch.Generator()
    seen = set()
    for seed in range(60):
        classes = texts.draw_classes(label, generator.manual_seed(seed))
        assert classes.tolist() == texts.draw_classes(label, generator.manual_seed(seed)).tolist()
        assert classes.tolist() == sorted(set(classes.tolist()))
        assert len(classes) == 3
        assert classes[torch.searchsorted(classes, label)].tolist() == label.tolist()
        seen |= set(classes.tolist()) - {4, 1}
    assert seen == {0, 2, 3}
    assert texts.draw_classes(torch.tensor([0, 1, 2, 3]), generator).tolist() == [0, 1, 2, 3]  # more than three: all
    before = generator.get_state()
    for off in (None, 5, 9):
        texts.classes_per_step = off
        assert texts.draw_classes(label, generator).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(generator.get_state(), before)  # the default draws nothing

    classes = torch.tensor([1, 3, 4])
    video, target = torch.randn(2, 4, 3, 32, 32), torch.rand(2, 3).softmax(-1)
    whole = model(video, texts.tokens[:2])
    loss = contrastive_loss(model(video, texts.of(torch.tensor([[0, 1]]), classes)), target)
    assert_close(loss, contrastive_loss(whole[..., classes], target))


def test_a_run_may_sample_classes_and_draw_for_each_micro_batch(tmp_path):
    plain = small_config(tmp_path, epochs=1, batch_size=8, accumulate=2)
    losses = {}
    for name, change in {
        "plain": {},
        "all classes": {"classes_per_step": 8},
        "some classes": {"classes_per_step": 5},
        "micro-batches": {"draws": "microbatch"},
    }.items():
        settings = dataclasses.replace(plain.train, **change)
        run = train(dataclasses.replace(plain, run_dir=str(tmp_path / name), train=settings))
        losses[name] = run.history[0]["loss"]
    assert losses["all classes"] == losses["plain"]
    assert len(set(losses.values())) == 3


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def test_the_flops_of_a_step_are_those_of_its_towers():
    model = build_model(small_model())
    texts = texts_of(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    groups = (texts.tokens[0, :2, :7], texts.tokens[1, :3, :11])
    of_texts, of_clips = step_flops(model, StepTexts(groups, torch.zeros(2, 5).long(), True, False), (2, 4, 3, 32, 32))
    blocks = [p for name, p in model.clip.transformer.named_parameters() if name.endswith("weight") and p.ndim == 2]
    weights, width = sum(p.numel() for p in blocks), 32
    tokens = [(len(group), group.shape[1]) for group in groups]
    products = sum(2 * weights * n * length + 2 * 2 * n * length**2 * width for n, length in tokens)
    projection = 2 * 5 * width * 16
    assert of_texts == pytest.approx(3 * (products + projection), rel=1e-3)  # the backward is twice the forward
    assert of_clips > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    freeze(model, "temporal")
    _, fewer = step_flops(model, StepTexts(groups, torch.zeros(2, 5).long(), True, False), (2, 4, 3, 32, 32))
    assert fewer < of_clips


def test_the_header_says_what_the_texts_cost():
    model = build_model(small_model())
    said = texts_of(model).describe((2, 4, 3, 32, 32))
    assert said.startswith("10 texts a step of 3 to 12 tokens, 10 on each process; their tower does ")
    assert "% if each process encoded all of them whole)" in said


@pytest.mark.parametrize(
    ("setting", "value"), [("draws", "epoch"), ("classes_per_step", 1), ("max_logit_scale", 0.0), ("decay", "none")]
)
def test_wrong_settings_are_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"train.{setting} must be"):
        TrainConfig(**{setting: value})


# ---- processes ------------------------------------------------------------------------------------------------------

CASES = [
    (torch.tensor([[2, 0], [2, 0]]), torch.arange(5)),  # 10 texts for 2 processes
    (torch.tensor([[1], [1]]), torch.arange(5)),  # 5: does not divide
    (torch.tensor([[0, 0], [2, 1]]), torch.tensor([0, 1, 4])),  # each its own draw, with replacement
    (torch.tensor([[1], [1]]), torch.tensor([3])),  # fewer texts than processes
]


def _loss(logits, target):
    """Of gradients of about 1 at most, with one class too."""
    return (logits / 14 * target).square().mean()


def _step(runner, texts, video, target):
    """The loss of one step; leaves its gradients."""
    runner.zero_grad()
    loss = _loss(runner(video, texts), target)
    loss.backward()
    return loss.detach()


def _full(model):
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def _process(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}  # the processes meet in a file
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    AcceleratorState._reset_state(reset_partial_state=True)  # that of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    torch.manual_seed(0)
    model = build_model(small_model())
    tokens = tokenize(PROMPTS, context_length=16)
    texts = TrainingTexts(model, tokens, accelerator, per_step=2)
    whole_video = torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    own = slice(2 * rank, 2 * rank + 2)

    sharded = copy.deepcopy(model)
    for block in [*sharded.clip.transformer.resblocks, *sharded.clip.visual.transformer.resblocks]:
        fully_shard(block)
    fully_shard(sharded, ignored_params={sharded.clip.logit_scale})  # it takes no scalars
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    for prompts, classes in CASES:
        target = torch.randn(4, prompts.shape[1], len(classes), generator=torch.Generator().manual_seed(2))
        plain = tokens[prompts[rank]][:, classes]
        expected = _step(wrapped, plain, whole_video[own], target[own])
        gradients = _full(wrapped.module)
        of_step = texts.of(prompts, classes)
        number = len(prompts.unique()) * len(classes)
        assert sum(map(len, of_step.groups)) == -(-number // 2)
        for runner, parameters in ((wrapped, wrapped.module), (sharded, sharded)):
            assert_close(_step(runner, of_step, whole_video[own], target[own]), expected, rtol=1e-5, atol=1e-6)
            found = _full(parameters)
            if runner is sharded:
                dist.all_reduce(found["clip.logit_scale"].div_(2))
            assert_close(found, gradients, rtol=1e-5, atol=1e-6)
        single = copy.deepcopy(model)  # the whole batch in one process
        losses = []
        for other in (0, 1):
            part = slice(2 * other, 2 * other + 2)
            loss = _loss(single(whole_video[part], tokens[prompts[other]][:, classes]), target[part])
            (loss / 2).backward()
            losses.append(loss.detach())
        assert_close(losses[rank], expected, rtol=1e-5, atol=1e-6)
        assert_close(_full(single), gradients, rtol=1e-5, atol=1e-6)

    texts.classes_per_step = 3
    drawn = texts.draw_classes(torch.tensor([1 + 2 * rank, 1]), torch.Generator().manual_seed(0))
    assert {1, 3} <= set(drawn.tolist())  # those of both processes, on both
    assert len(drawn) == 3
    texts.draws, texts.per_step = "microbatch", 8
    both = texts.draw(torch.Generator().manual_seed(0))
    assert both.shape == (2, 8)
    assert both[0].tolist() != both[1].tolist()
    freeze(model, "temporal")
    frozen = TrainingTexts(model, tokens, accelerator, per_step=2).of(both, torch.arange(5))
    assert_close(frozen.encode(model.clip), model.encode_text(tokens[both[rank]]))
    dist.destroy_process_group()


def test_two_processes_that_share_texts_have_the_loss_and_the_gradients_of_two_that_do_not(tmp_path):
    torch.multiprocessing.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="fork")
