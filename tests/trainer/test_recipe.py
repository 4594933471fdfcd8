from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moon.data.preprocess import Preprocess
from moon.errors import RecipeError
from moon.trainer.keys import dotted_keys
from moon.trainer.methods import MixupRecipe
from moon.trainer.recipe import (
    AUGMENTS,
    DISTRIBUTIONS,
    OFFICIAL,
    RULES,
    DataRecipe,
    MoonRecipe,
    Recipe,
    UpdateRecipe,
)
from moon.trainer.sparsity import budget
from moon.trainer.sparsity.rules import rule_names
from tests.trainer.recipes_small import tiny_recipe

TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()))
UNIT = st.floats(0.01, 0.99)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    epochs = draw(st.integers(2, 500))
    rule = draw(st.sampled_from(["dense", "static", "set", "rigl"]))
    channels = draw(st.sampled_from([1, 3]))
    mean = draw(st.lists(st.floats(0, 1), min_size=channels, max_size=channels))
    side = draw(st.integers(1, 300))
    moon = MoonRecipe(
        enabled=draw(st.booleans()),
        loss=draw(st.booleans()),
        auto=draw(st.booleans()),
        vote=draw(st.booleans()),
        w_final=draw(st.floats(0, 100)),
        init_factor=draw(st.floats(0.1, 1000)),
        warmup_epochs=draw(st.none() | st.integers(0, epochs - 1)),
        vote_epochs=draw(st.none() | st.integers(0, epochs - 1)),
    )
    votes = moon.vote_epochs if moon.vote_epochs is not None else epochs // 5
    return Recipe(
        name=draw(TEXTS),
        model=draw(TEXTS),
        pretrained=draw(st.none() | TEXTS),
        sparsity=0.0 if rule == "dense" else draw(UNIT),
        rule=rule,
        distribution=draw(st.sampled_from(DISTRIBUTIONS)),
        dense=tuple(draw(st.lists(TEXTS, max_size=3))),
        epochs=epochs,
        batch_size=draw(st.integers(2, 4096)),
        lr=draw(st.floats(1e-8, 10)),
        seed=draw(st.integers(0, 2**31)),
        schedule=draw(st.sampled_from(["cosine", "moon"])),
        data=DataRecipe(
            train=draw(TEXTS),
            val=draw(st.one_of(TEXTS, UNIT, st.integers(1, 10**6))),
            augment=draw(st.sampled_from(AUGMENTS)),
            preprocess=Preprocess(
                crop=(side, draw(st.integers(1, side))),
                resize=draw(st.none() | st.just(side + 8)),
                mean=tuple(mean),
                std=(0.5,) * channels,
            ),
        ),
        update=UpdateRecipe(stop=draw(st.floats(0.01, 1)) * (epochs - votes) / epochs),
        moon=moon,
    )


@given(recipes())
def test_toml_round_trip(recipe: Recipe) -> None:
    again = Recipe.from_toml(recipe.to_toml())
    assert again == recipe
    assert again.hash == recipe.hash
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_whole_number_for_a_real_one_is_the_same_recipe() -> None:
    recipe = tiny_recipe("moon.w_final=2")
    table = recipe.to_dict()
    table["moon"]["w_final"] = 2
    assert Recipe.from_dict(table).hash == recipe.hash
    assert dataclasses.replace(recipe, lr=1).hash == dataclasses.replace(recipe, lr=1.0).hash


def test_hash_covers_everything_but_the_name() -> None:
    recipe = tiny_recipe()
    assert recipe.override(["name=other"]).hash == recipe.hash
    changes = {
        "model": "resnet18", "pretrained": "x.pt", "sparsity": "0.7", "rule": "set",
        "distribution": "er", "dense": "stem", "epochs": "7", "batch_size": "16", "lr": "0.2",
        "momentum": "0.5", "nesterov": "false", "weight_decay": "0", "schedule": "cosine",
        "seed": "1", "data.train": "x", "data.val": "9", "data.preprocess.crop": "4,4",
        "data.preprocess.resize": "9", "data.preprocess.mean": "0.1", "data.preprocess.std": "2",
        "data.preprocess.interpolation": "nearest", "data.augment": "none",
        "update.interval": "9", "update.drop_fraction": "0.1", "update.stop": "0.1",
        "moon.enabled": "false", "moon.loss": "false", "moon.auto": "false", "moon.vote": "false",
        "moon.w_final": "9", "moon.init_factor": "9", "moon.warmup_epochs": "2",
        "moon.vote_epochs": "1", "temperature": "true", "compat": "votes",
        "structure": "fan-in", "logitnorm.tau": "1", "mixup.alpha": "0.5", "cigl.rate": "0.5",
        "dac.alpha_final": "2", "dac.init_factor": "2", "dac.warmup_epochs": "2",
        "vos.warmup_epochs": "1", "vos.weight": "1", "vos.queue": "9", "vos.sample_from": "9",
        "vos.select": "9",
    }  # fmt: skip
    tables = {"logitnorm", "mixup", "dac", "vos", "cigl"}
    assert set(changes) == set(dotted_keys(Recipe)) - tables - {"name"}
    hashes = set()
    for key, value in changes.items():
        # Rival losses exclude each other.
        rival = ["moon.loss=false"] if key.startswith(("dac.", "vos.")) else []
        hashes.add(recipe.override([f"{key}={value}", *rival]).hash)
    assert len(hashes | {recipe.hash}) == len(changes) + 1


def test_a_table_that_may_be_absent() -> None:
    recipe = tiny_recipe()
    assert recipe.mixup is None and "mixup" not in recipe.to_dict()
    mixed = recipe.override(["mixup.alpha=0.4"])
    assert mixed.mixup == MixupRecipe(alpha=0.4)
    assert Recipe.from_toml(mixed.to_toml()) == mixed
    assert recipe.override(["mixup={}"]).mixup == MixupRecipe()
    assert mixed.override(["mixup=none"]) == recipe


def test_differences_of_the_official_code() -> None:
    recipe = tiny_recipe("compat=votes,bernoulli")
    followed = [name for name in OFFICIAL if recipe.follows(name)]
    assert followed == ["votes", "bernoulli"]
    assert all(tiny_recipe("compat=official").follows(name) for name in OFFICIAL)
    assert not any(tiny_recipe().follows(name) for name in OFFICIAL)


def test_an_unknown_output_comes_with_moon_and_with_dac() -> None:
    assert tiny_recipe().unknown
    plain = tiny_recipe("moon.enabled=false")
    assert not plain.unknown and not plain.votes
    assert plain.override(["dac.alpha_final=1"]).unknown
    assert plain.override(["cigl.rate=0.1"]).vote_epochs == 2


def test_phases_follow_the_epochs() -> None:
    recipe = tiny_recipe("data.val=0.1")
    free = dataclasses.replace(recipe, moon=MoonRecipe(enabled=True), epochs=100)
    assert (free.warmup_epochs, free.vote_epochs) == (5, 20)
    assert free.override(["epochs=20"]).resolved().moon == MoonRecipe(
        enabled=True, warmup_epochs=1, vote_epochs=4
    )
    for epochs in range(1, 12):
        short = free.override([f"epochs={epochs}", "update.stop=0.7"])
        assert 0 <= short.warmup_epochs < epochs
        assert short.vote_epochs <= 0.2 * epochs
    assert free.override(["moon.vote=false"]).vote_epochs == 0
    assert free.override(["moon.vote=false"]).plateau_epochs == 20
    assert free.resolved().hash == free.hash


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", "unknown recipe key epoch. Did you mean epochs."),
        ("w_final=3", "unknown recipe key w_final. Did you mean moon.w_final."),
        ("moon.w_fnal=3", "unknown recipe key moon.w_fnal. Did you mean moon.w_final."),
        ("zzzzzz=1", "unknown recipe key zzzzzz. Known keys: name, model"),
        ("moon=3", "moon is a table, not a value. Set one of moon.enabled, moon.loss"),
        ("epochs", "--set 'epochs' is not key=value"),
        ("epochs=1.5", "epochs is 1.5. Give a whole number."),
        ("epochs=true", "epochs is True. Give a whole number."),
        ("epochs=0", "epochs is 0. Give a whole number of at least 1"),
        ("batch_size=1", "batch_size is 1"),
        ("lr=nan", "lr is nan. Give a number above 0"),
        ("lr=fast", "lr is 'fast'. Give a number."),
        ("momentum=1", "momentum is 1.0"),
        ("momentum=0", "nesterov needs a momentum above 0"),
        ("weight_decay=-1", "weight_decay is -1.0"),
        ("seed=-1", "seed is -1"),
        ("seed=99999999999999999999", "Give a whole number below 2**63"),
        ("moon.w_final=1e308", "moon.w_final is 1e+308. Give a number of at least 0 and at most"),
        ("dac.alpha_final=1e308", "dac.alpha_final is 1e+308. Give a number above 0 and at most"),
        ("lr=inf", "lr is inf. Give a number above 0 and at most"),
        ("weight_decay=nan", "weight_decay is nan. Give a number of at least 0"),
        ("sparsity=1", "sparsity is 1.0"),
        ("sparsity=0", "rule rigl has sparsity 0"),
        ("rule=dense", "rule dense cannot have sparsity 0.8"),
        ("rule=magic", "rule is 'magic'. Give one of dense, static, set, rigl, gmp."),
        ("structure=4:2", "4:2"),
        ("compat=all", "compat is 'all'. Give one of official, votes"),
        ("mixup.alpha=0", "mixup.alpha is 0.0. Give a number above 0."),
        ("mixup=3", "mixup is 3. Give a table or none."),
        ("logitnorm.t=1", "unknown recipe key logitnorm.t. Did you mean logitnorm.tau."),
        ("cigl.rate=1", "cigl.rate is 1.0. Give a share of at least 0 and below 1."),
        ("dac.alpha_final=1", "dac and moon each have a loss of their own. Set dac=none"),
        ("vos.warmup_epochs=-1", "vos.warmup_epochs is -1"),
        ("vos.queue=0", "vos.queue is 0. Give a whole number of at least 1."),
        ("dac.warmup_epochs=0", "dac.warmup_epochs is 0. Give a whole number of at least 1."),
        ("distribution=flat", "distribution is 'flat'"),
        ("schedule=step", "schedule is 'step'. Give one of cosine, moon."),
        ("dense=1,2", "dense is [1, 2]. Give a list of texts."),
        ("data.val=0", "data.val is 0. Give a count of at least 1."),
        ("data.val=1.0", "data.val is 1.0. Give a share between 0 and 1, or a count."),
        ("data.val=", "data.val is empty"),
        ("data.augment=cutmix", "data.augment is 'cutmix'"),
        ("data.preprocess.crop=3", "data.preprocess.crop is [3]. Give a list of 2 whole numbers."),
        ("data.preprocess.std=0", "data.preprocess: std must be above 0"),
        ("data.preprocess.interpolation=best", "one of bilinear, bicubic, nearest"),
        ("update.interval=0", "update.interval is 0"),
        ("update.drop_fraction=1", "update.drop_fraction is 1.0"),
        ("update.stop=0", "update.stop is 0.0"),
        ("update.stop=0.7", "update.stop to at most 0.666."),
        ("moon.w_final=-1", "moon.w_final is -1.0"),
        ("moon.init_factor=0", "moon.init_factor is 0.0"),
        ("moon.warmup_epochs=6", "moon.warmup_epochs is 6 of 6 epochs"),
        ("moon.vote_epochs=-1", "moon.vote_epochs is -1"),
        ("moon.enabled=maybe", "moon.enabled is 'maybe'. Give true or false."),
    ],
)  # fmt: skip
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(setting)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_settings_are_read_by_the_type_of_their_key() -> None:
    recipe = tiny_recipe(
        "name=3",
        "data.train=/x.npz#train{label in 0..7}[0:5]",
        "data.val=/some/folder",
        "dense=stem, head",
        "pretrained=weights.pt",
        "data.preprocess.mean=.1,.2,.3",
        "data.preprocess.std=[0.1, 1, 1.0]",
        "moon.enabled=False",
        "lr=1e-1",
        "lr=1",
    )
    assert recipe.name == "3"
    assert recipe.data.train == "/x.npz#train{label in 0..7}[0:5]"
    assert recipe.data.val == "/some/folder"
    assert recipe.dense == ("stem", "head")
    assert recipe.pretrained == "weights.pt"
    assert recipe.data.preprocess.mean == (0.1, 0.2, 0.3)
    assert recipe.data.preprocess.std == (0.1, 1.0, 1.0)
    assert recipe.moon.enabled is False
    assert recipe.lr == 1.0
    assert recipe.override(["pretrained=none"]).pretrained is None
    assert recipe.override(["moon.vote_epochs=none"]).moon.vote_epochs is None
    assert type(recipe.override(["data.val=5000"]).data.val) is int
    assert type(recipe.override(["data.val=0.25"]).data.val) is float


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("moon.enabled=false", "dac.init_factor=64", "epochs=1"),
            "dac needs an epoch to warm up. Set epochs to at least 2.",
        ),
        (("cigl.rate=0.1", "compat=official"), "cigl and compat dropconnect are two random masks"),
        (("pretrained=a.pt", "compat=bernoulli"), "compat bernoulli needs the structure"),
    ],
)
def test_settings_that_cannot_go_together(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny_recipe(*settings)
    assert message in str(caught.value)


def test_a_value_cannot_smuggle_in_another_key() -> None:
    recipe = tiny_recipe("data.val=x\nseed = 9")
    assert (recipe.seed, recipe.data.val) == (0, "x\nseed = 9")
    with pytest.raises(RecipeError, match="lr is"):
        tiny_recipe("lr=0.1\nseed = 9")


def test_the_choices_are_those_of_the_sparsifier() -> None:
    assert set(RULES) == set(rule_names())
    assert DISTRIBUTIONS == budget.DISTRIBUTIONS


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'model = "cnn"\n[data]\ntrain = "x"\n'
        "[data.preprocess]\ncrop = [8, 8]\nmean = [0.5]\nstd = [0.5]\n"
    )
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.model, recipe.epochs) == ("mine", "cnn", 100)
    path.write_text("model = \n")
    with pytest.raises(RecipeError, match=r"recipe mine is not TOML: .*line 1"):
        Recipe.load(path)
    path.write_text('model = "cnn"\n')
    with pytest.raises(RecipeError, match=r"the recipe has no data\. Set data"):
        Recipe.load(path)
    path.write_text('[data]\ntrain = "x"\npreprocess = 3\n')
    with pytest.raises(RecipeError, match=r"data\.preprocess is 3\. Give a table"):
        Recipe.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="there is no recipe file"):
        Recipe.load(tmp_path / "none.toml")
