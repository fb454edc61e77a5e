"""What the configuration accepts and how it refuses."""

import json
from pathlib import Path

import pytest

from pixelgen_fast import config as cfg
from pixelgen_fast.cli import main
from pixelgen_fast.compare import schema as compare_schema
from pixelgen_fast.decoding import schema as decoder_schema
from pixelgen_fast.distill import schema as teacher_schema
from pixelgen_fast.models import model_schema

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = str(CONFIGS / "digits.yaml")


def load(*overrides: str) -> cfg.Config:
    return cfg.load(DIGITS, overrides, model_schema)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid_and_says_how_to_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = path.stem.split("_")[0] if path.stem.startswith(("teacher", "compare", "decoder")) else "train"
    if command == "teacher":
        teacher_schema.load(path, [])
    elif command == "decoder":
        decoder_schema.load(path, [])
    elif command == "compare":
        monkeypatch.chdir(CONFIGS.parent)
        compare_schema.load(path)
    else:
        cfg.load(path, [], model_schema)
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"{command} configs/{path.name}" in line for line in head)
    assert any(line.startswith("# Hardware:") for line in head)


def test_overrides_are_typed() -> None:
    config = load("optimizer.lr=2e-4", "optimizer.ema=[0.9,0.99]", "sample.interval=[0.1,0.9]", "data.num_classes=null")
    assert config.optimizer.lr == 2e-4 and config.optimizer.ema == [0.9, 0.99]
    assert config.sample.interval == (0.1, 0.9) and config.data.num_classes is None


@pytest.mark.parametrize("text", ["set #2", "007", "1e3", "yes", "a: b", "[x", "${HOME}x".replace("$", "S")])
def test_a_text_stays_as_it_was_typed(text: str) -> None:
    assert load(f"data.root={text}").data.root == text


def test_what_yaml_means_stands_in_quotes_or_elsewhere() -> None:
    assert load("data.root='set #2'").data.root == "set #2"
    assert load("run.init=null").run.init is None and load("run.init=07").run.init == "07"
    assert load("optimizer.lr=2e-4").optimizer.lr == 2e-4
    with pytest.raises(cfg.ConfigError, match="optimizer.lr"):
        load("optimizer.lr=2e-4 # higher")


@pytest.mark.parametrize("value", ["${", "[1, 2", "{a: b: c}"])
def test_what_is_no_value_is_refused_by_name(value: str) -> None:
    with pytest.raises(cfg.ConfigError, match="optimizer.clip"):
        load(f"optimizer.clip={value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.num_heads=0", "model.num_heads is 0; it must be above 0"),
        ("model.patch_size=0", "model.patch_size is 0; it must be above 0"),
        ("model.num_heads=256", "model.num_heads 256 does not divide model.hidden_size"),
        ("sample.interval={}", "sample.interval"),
        ("sample.grid_per_class=9223372036854775808", "sample.grid_per_class"),
    ],
)
def test_what_no_run_can_be_built_of_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(cfg.ConfigError, match=message):
        load(text)


def test_a_dry_run_looks_for_the_folder_to_resume_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CONFIGS / "digits.yaml"), "--dry-run", "run.resume=0"]) == 2
    assert "run.resume is 0, and there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["model.system=jit", "model.system='jit'", "model={system: jit}"])
def test_a_system_is_chosen_as_every_value_is_given(text: str) -> None:
    with pytest.raises(cfg.ConfigError, match="patch_depth: unknown key"):  # of the file's PixelDiT
        load(text)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load("run.dir=~/runs/x", "data.root=~/images")
    assert config.run.dir == "/home/someone/runs/x" and config.data.root == "/home/someone/images"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--per-class", "-2"], "--per-class is -2"),
        (["--shift", "0"], "--shift is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--interval", "0.9", "0.1"], "--interval is"),
    ],
)
def test_options_of_sampling_are_refused_by_name(
    options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", "no_such_run", *options]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "rule"),
    [
        (["sample", "no_such_run"], "--per-class", "from 1 to 100,000"),
        (["evaluate", "no_such_run"], "--samples", "from 2 to 100,000,000"),
        (["data", "pack", "digits", "no_such_folder"], "--size", "from 1 to 16,384"),
        (["data", "scan", "digits"], "--workers", "from 0 to 1,024"),
        (["data", "bench", "digits"], "--cores", "from 1 to 1,024"),
        (["demo", "no_such_run"], "--port", "from 0 to 65,535"),
        (["plan", str(DIGITS)], "--gpus", "from 1 to 1,000,000"),
    ],
)
@pytest.mark.parametrize("value", ["-1", str(2**63), str(10**400)])
def test_whole_numbers_beyond_reason_are_refused_by_the_option(
    command: list[str], option: str, rule: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, option, value]) == 2
    assert f"{option} is {value}; it must be {rule}" in capsys.readouterr().err


def test_plain_types_round_trip() -> None:
    config = load("optimizer.schedule=stepped", "optimizer.drops=[{at_images: 640, lr: 1e-5}]")
    assert cfg.from_dict(cfg.to_dict(config), model_schema) == config
    # what a checkpoint gives back, so that a resumed run sees no change where there is none
    assert json.loads(json.dumps(cfg.to_dict(config))) == cfg.to_dict(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("model.patchsize=4", "did you mean model.patch_size?"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean optimizer?"),
        ("train.zero_stage=4", r"expected one of \[1, 2, 3\]"),
        ("sample.solver=rk4", "expected one of .*'heun'"),
        ("train.images=many", "train.images: Value 'many'"),
        ("train", "write key.sub=value"),
        ("train.micro_batch=3", "valid micro batches: 1, 2, 4, 8, 16, 32"),
        ("objective.class_drop=1.5", r"class_drop is 1.5; it lies in \[0, 1\)"),
        ("optimizer.ema=[1.0]", "decays between 0 and 1"),
        ("optimizer.schedule=stepped", "give optimizer.drops"),
        ("optimizer.muon.momentum=0.9", "optimizer.muon is given, but optimizer.name is adamw; set it to muon"),
        ("optimizer.muon.momentum=1", r"optimizer.muon.momentum is 1.0; it lies in \[0, 1\)"),
        ("optimizer.muon.scale=none", "optimizer.muon.scale: .*expected one of .*'original'"),
        ("sample.interval=[0.9,0.1]", "the first must be below"),
        ("objective.sigma0=2", "objective.sigma0 is given, but objective.path is linear"),
        ("objective.release=[0.1,0.8]", "objective.release is given, but objective.path is linear"),
        ("objective={path: energy_guided, predict: e}", "energy_guided with objective.predict e and objective.loss v"),
        ("objective={path: energy_guided, loss: x}", "energy_guided with objective.predict v and objective.loss x"),
        ("objective={path: energy_guided, release: [0.8, 0.8]}", r"objective.release is \[0.8, 0.8\]; the first must"),
        ("train.images=0", "train.images is 0; it must be above 0"),
        ("model.system=unet", "unknown system 'unet'"),
    ],
)
def test_refusals_name_the_key_and_the_fix(override: str, message: str) -> None:
    with pytest.raises(cfg.ConfigError, match=message):
        load(override)


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(cfg.ConfigError, match="compile_blocks does not work with train.zero_stage 3"):
        load("train.compile_blocks=true", "train.zero_stage=3")
    with pytest.raises(cfg.ConfigError, match="wrong gradients with train.zero_stage 3"):
        load("train.recompute=operators", "train.zero_stage=3")
    with pytest.raises(cfg.ConfigError, match="muon does not go with train.zero_stage 3: it needs whole matrices"):
        load("optimizer.name=muon", "train.zero_stage=3")
    with pytest.raises(cfg.ConfigError, match="bf16 on run.device cpu"):
        load("train.precision=bf16", "run.device=cpu")
    config = load("train.global_batch=64", "train.micro_batch=32")
    assert cfg.check_world(config, 1) == 2 and cfg.check_world(config, 2) == 1
    with pytest.raises(cfg.ConfigError, match="does not divide the 16 images"):
        cfg.check_world(config, 4)
    with pytest.raises(cfg.ConfigError, match="does not divide over 3 ranks"):
        cfg.check_world(config, 3)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(cfg.ConfigError, match="no such configuration file; there are .*digits.yaml"):
        cfg.load(CONFIGS / "digit.yaml", [], model_schema)
    for text, message in [
        ("model: {system", "not valid YAML"),
        ("- 1\n", "mapping of sections"),
        ("run: {seed: 1}\n", "model.system is missing"),
    ]:
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(cfg.ConfigError, match=message):
            cfg.load(tmp_path / "x.yaml", [], model_schema)


def test_command_line_refuses_with_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["train", DIGITS, "optimizer.lrr=1"]) == 2
    assert "did you mean optimizer.lr?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "run", "strange"])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("pixeldit_b_256", "184,749,155", "75.43"),
        ("pixeldit_l_256", "569,648,963", "227.77"),
        ("pixeldit_xl_256", "797,383,203", "311.19"),
        ("pixeldit_xl_512", "797,383,203", "1352.24"),
    ],
)
def test_dry_run_prints_the_published_sizes(
    name: str, parameters: str, gflops: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", str(CONFIGS / f"{name}.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert parameters in printed and f"{gflops} forward" in printed and "stage 3" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model.patch_depth=1000000000", "model.patch_depth is 1000000000; it must be at most 1,000"),
        ("model.hidden_size=1000000000", "model.hidden_size is 1000000000; it must be at most 65,536"),
        ("data.image_size=1000000000", "data.image_size is 1000000000; it must be at most 16,384"),
        ("sample.steps=1000000000", "sample.steps is 1000000000; it must be at most 100,000"),
        (f"data.num_classes={2**63 - 1}", f"data.num_classes is {2**63 - 1}; it must be at most 10,000,000"),
        ("train.global_batch=9223372036854775807", "is 9223372036854775807; it must be at most 1,000,000"),
        (f"train.images={2**63}", f"train.images is {2**63}; it must be a number of 64 bits"),
        (f"optimizer.lr={10**400}", "int too large to convert to float"),
        ("sample.passes=0", "sample.passes is 0; it must be above 0"),
        ("sample.temperature=-0.5", "sample.temperature is -0.5; it must not be negative"),
    ],
)
def test_numbers_beyond_reason_are_refused(text: str, message: str) -> None:
    with pytest.raises(cfg.ConfigError, match=message):
        cfg.load(DIGITS, [text], model_schema)


@pytest.mark.parametrize("text", ["sample.temperature=0.9", "sample.passes=8"])
def test_a_setting_that_a_system_ignores_is_refused_before_anything_starts(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    assert main(["train", DIGITS, text, f"run.dir={run}"]) == 2
    said = capsys.readouterr().err
    assert f"{text.split('=')[0]} is {text.split('=')[1]}; pixeldit has no use for it" in said and not run.exists()


def test_a_combination_that_cannot_work_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(Path(DIGITS).read_text().replace("micro_batch: 32", "micro_batch: 24"))
    with pytest.raises(cfg.ConfigError, match=r"mine\.yaml: train\.global_batch 32 is not a multiple"):
        cfg.load(path, [], model_schema)


@pytest.mark.parametrize("text", ["[\n\x02=nan", "optimizer[0]=1", "]=1", ".mlp.=1", "optimizer..lr=1"])
def test_an_override_of_no_key_is_refused(text: str) -> None:
    with pytest.raises(cfg.ConfigError, match="override .*: write key.sub=value"):
        cfg.load(DIGITS, [text], model_schema)
