"""A CLIP and a run small enough for tests."""

from pathlib import Path

from claver.config import Config, DataConfig, ModelConfig, TestConfig, TrainConfig
from claver.data.augment import AugmentConfig
from claver.data.motions import write_motion_dataset

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1}


def small_model(**changes) -> ModelConfig:
    defaults = {"name": "small", "pretrained": None, "embed_dim": 16, "vision": VISION, "text": TEXT, "frames": 4}
    return ModelConfig(**(defaults | changes))


def small_config(folder: Path, *, num_train: int = 16, num_test: int = 8, run: str = "run", **train) -> Config:
    """A run on freshly written videos of motions in `folder / "data"`."""
    dataset = write_motion_dataset(
        folder / "data", num_train=num_train, num_test=num_test, size=32, num_frames=8, progress=False
    )
    defaults = {
        "epochs": 2,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup_epochs": 1.0,
        "prompts_per_step": 2,
        "evaluate_every": 1,
        "trackers": (),
    }
    return Config(
        run_dir=str(folder / run),
        data=DataConfig(
            root=str(dataset.root),
            train_list=str(dataset.train_list),
            test_list=str(dataset.test_list),
            labels=str(dataset.labels),
            templates=("a video of {}.", "an object {}.", "{}."),
            num_workers=0,
        ),
        model=small_model(),
        augment=AugmentConfig(size=32, short_side=32, flip=0),
        train=TrainConfig(**(defaults | train)),
        test=TestConfig(clips=2, crops=1, batch_size=3),
    )
