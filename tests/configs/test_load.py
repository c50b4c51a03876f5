"""Stage, run and cluster files: where they are found, what is filled in, and what a mistake says."""
from __future__ import annotations

from pathlib import Path

import pytest

import configs
from configs.load import (
    ABSENT, ConfigError, Resolved, Stage, diff, dump, list_runs, list_stages, load_cluster, load_run, load_stage,
    look_up, read_run, resolve_text, with_values,
)
from configs.schema import Environment, Phase3Run, ResumeGlob, SlurmNode, SshNode, parse_duration


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return load_stage("phase3", tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def failure(stage: Stage, *sets: str, config: str = "demo") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_run(stage, config, list(sets), Path.cwd())
    assert caught.value.exit_code == 2
    return caught.value


# --- finding -------------------------------------------------------------------------------------

def test_the_nearest_stage_file_wins(tmp_path: Path) -> None:
    inner = tmp_path / "project" / "deep"
    inner.mkdir(parents=True)
    write(tmp_path / "configs/stages/mine.yaml", "about: outer\npython: a.py\n")
    near = write(tmp_path / "project/configs/stages/mine.yaml", "about: inner\npython: b.py\n")
    assert load_stage("mine", inner).source == near
    assert {"mine", "phase3"} <= set(list_stages(inner))


def test_an_unknown_stage_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such stage") as caught:
        load_stage("phas3", tmp_path)
    assert "nearest: phase3" in str(caught.value)


def test_a_run_file_is_found_by_name_then_by_path(stage: Stage, tmp_path: Path) -> None:
    text = dump(load_run(stage, "demo", [], tmp_path).data)
    path = write(tmp_path / "configs/runs/phase3/wide; rm -rf $x 생쥐.yaml", text)
    assert load_run(stage, "wide; rm -rf $x 생쥐", [], tmp_path).source == path
    assert load_run(stage, str(path.relative_to(tmp_path)), [], tmp_path).source == path
    assert set(list_runs("phase3", tmp_path)) >= {"demo", "exp_c", path.stem}
    assert load_run(stage, None, [], tmp_path).source == Path(configs.__file__).parent / "runs/phase3/exp_c.yaml"
    assert "demo" in str(failure(stage, config="dmo"))


# --- what a run file becomes -------------------------------------------------------------------------------------

def test_the_shipped_run_files_say_what_the_method_asks_for(stage: Stage, tmp_path: Path) -> None:
    demo, mouse = (load_run(stage, name, [], tmp_path).typed for name in ("demo", "exp_c"))
    assert isinstance(demo, Phase3Run) and isinstance(mouse, Phase3Run)
    assert (demo.model.d, demo.model.n_layer, demo.model.patch_size, demo.model.image_size) == (128, 4, 4, 32)
    assert (demo.training.max_steps, demo.training.optimizer.lr, demo.training.schedule.warmup) == (600, 1e-3, 20)
    assert (mouse.training.optimizer.lr, mouse.training.optimizer.grad_clip, mouse.training.schedule.warmup) == (5e-6, .5, 500)
    assert (mouse.training.precision, mouse.training.input_views, mouse.training.losses.lpips) == ("bf16", 5, 0)
    assert (mouse.model.scale_bias, mouse.model.scale_max, mouse.model.opacity_bias) == (-2.3, -1.2, -2.0)


def test_a_resolved_run_is_complete_and_reads_back_the_same(stage: Stage, tmp_path: Path) -> None:
    run = load_run(stage, "demo", ["training.seed=7"], tmp_path)
    config = write(tmp_path / "config.yaml", dump(run.data))
    assert run.data["training"]["optimizer"]["beta2"] == 0.95 and run.data["init_from"] is None
    assert "resources" not in run.data
    again = load_run(stage, str(config), [], tmp_path)
    assert (again.data, read_run(config, Phase3Run).training) == (run.data, run.typed.training)


def test_resources_are_the_stages_with_what_the_run_file_and_set_change(stage: Stage, tmp_path: Path) -> None:
    run = load_run(stage, "demo", ["resources.procs=3", "resources.time=1h30m"], tmp_path)
    assert (stage.spec.resources.gpus, run.resources.gpus, run.resources.procs) == (1, 0, 3)
    assert parse_duration(run.resources.time) == 5400
    again = resolve_text(stage, dump(run.data), "job x", [], run.resources)
    assert again.resources == run.resources


def test_path_keys_are_known_and_can_be_replaced(stage: Stage, tmp_path: Path) -> None:
    run = load_run(stage, "demo", ["training.dataset.path=../mouse/list.txt", "training.losses.perceptual=1",
                                   "training.losses.perceptual_weights=random:1"], tmp_path)
    assert run.path_keys == ("training.dataset.path", "training.validation.path")
    assert run.set_path_keys == ("training.dataset.path",)
    moved = with_values(run.data, {"training.dataset.path": "/data/list.txt"})
    assert diff(run.data, moved) == [("training.dataset.path", "../mouse/list.txt", "/data/list.txt")]


def test_diff_shows_leaves_and_absence() -> None:
    assert diff({"a": {"b": 1, "c": [1]}, "x": {}}, {"a": {"b": 1.0, "c": [1, 2]}, "x": {"y": None}}) == [
        ("a.b", 1, 1.0), ("a.c", [1], [1, 2]), ("x", {}, ABSENT), ("x.y", ABSENT, None)]


# --- --set -------------------------------------------------------------------------------------

def test_set_reads_yaml_where_a_value_is_wanted_and_text_where_text_is(stage: Stage, tmp_path: Path) -> None:
    odd = "a b: c #d'; echo $HOME\n생쥐=[x]"
    run = load_run(stage, "demo", ["training.optimizer.lr=5e-6", "phase3.training.max_steps=50", "wandb.mode=off",
                                   f"training.dataset.path={odd}", "training.validation.path='quoted: one'",
                                   "training.dataset.background=[0, 0.5, 1]", "init_from=null", "wandb.project=05"], tmp_path)
    training = run.data["training"]
    assert (training["optimizer"]["lr"], training["max_steps"], training["dataset"]["path"]) == (5e-6, 50, odd)
    assert (training["validation"]["path"], training["dataset"]["background"]) == ("quoted: one", [0.0, 0.5, 1.0])
    assert (run.data["wandb"], run.data["init_from"]) == ({"mode": "off", "project": "05"}, None)


@pytest.mark.parametrize(("argument", "key", "said", "hint"), [
    ("training.optimizer.lrr=1", "training.optimizer.lrr", "no such key", "nearest: training.optimizer.lr"),
    ("training.lr=1", "training.lr", "no such key", "nearest: training.optimizer.lr"),
    ("max_step=1", "max_step", "no such key", "nearest: training.max_steps"),
    ("training.max_steps.x=1", "training.max_steps.x", "no such key", None),
    ("training.optimizer={lr: 1, x: 2}", "training.optimizer.x", "no such key", "nearest"),
    ("training.optimizer.lr=fast", "training.optimizer.lr", "expected a number, got text", None),
    ("training.optimizer.lr=.inf", "training.optimizer.lr", "finite", None),
    ("training.optimizer.lr=0", "training.optimizer.lr", "> 0", None),
    ("training.max_steps=1.5", "training.max_steps", "expected a whole number", None),
    ("training.max_steps=true", "training.max_steps", "expected a whole number", None),
    ("training.targets=some", "training.targets", "must be all or heldout", None),
    ("training.dataset.background=[1, 1]", "training.dataset.background", "length 3", None),
    ("training.dataset=", "training.dataset", "got nothing", None),
    ("training.accumulation=601", "training.accumulation", "no update at all", None),
    ("resources.gpus=half", "resources.gpus", "whole number or shared", None),
    ("resources.time=soon", "resources.time", "no duration", None),
    ("training.max_steps=[1", None, "not valid YAML", None),
    ("training.max_steps", None, "KEY=VALUE", "--set training"),
    ("training..x=1", None, "KEY=VALUE", None),
])
def test_a_wrong_set_names_itself_the_key_and_the_remedy(
        stage: Stage, argument: str, key: str | None, said: str, hint: str | None) -> None:
    error = failure(stage, argument)
    assert (error.where or "").startswith(f"--set {argument}") and error.key == key
    assert said in error.what and (hint is None or hint in (error.hint or ""))


# --- mistakes in files -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("old", "new", "line", "key", "said"), [
    ("  d: 128", "  dd: 128", 3, "model.dd", "no such key"),
    ("  d: 128", "  d: '128'", 3, "model.d", "expected a whole number, got text"),
    ("  d_head: 64", "  d_head: 60", 4, "model.d_head", "does not divide"),
    ("training:", "trainning:", 10, "trainning", "no such key"),
    ("  max_steps: 600", "", 10, "training.max_steps", "is missing"),
    ("l2: 1.0, ssim: 0.5", "l2: 1.0, lpips: 0.1", 22, "training.losses.lpips_weights", "needs this file"),
    ("l2: 1.0, ssim: 0.5", "l2: 0, ssim: 0", 22, "training.losses", "nothing would be learned"),
    ("{path: demo/data_train.txt}", "{path: 5}", 11, "training.dataset.path", "expected text"),
])
def test_a_mistake_in_a_run_file_has_file_line_key_and_value(
        stage: Stage, tmp_path: Path, old: str, new: str, line: int, key: str, said: str) -> None:
    text = (Path(configs.__file__).parent / "runs/phase3/demo.yaml").read_text()
    assert old in text
    path = write(tmp_path / "broken.yaml", text.replace(old, new, 1))
    error = failure(stage, config=str(path))
    assert (error.where, error.key) == (f"{path}:{line}", key)
    assert said in error.what
    assert str(error).startswith(f"{path}:{line}: {key}")


@pytest.mark.parametrize(("text", "key", "said"), [
    ("about: x\n", None, "exactly one of"),
    ("about: x\npython: a\ntorchrun: b\n", None, "python"),
    ("about: x\ncommand: []\n", "command", "length"),
    ("about: x\npython: a\nprogress: {step: 'it ([0-9]+'}\n", "progress.step", "no regular expression"),
    ("about: x\npython: a\nprogress: {step: '[0-9]+'}\n", "progress.step", "one group"),
    ("about: x\npython: a\nresume: {glob: '*', arg: --from}\n", "resume.arg", "{path}"),
    ("about: x\npython: a\nresume: later\n", "resume", "launch or none or a mapping"),
    ("about: x\npython: a\nenv: {A: b, C: 4}\n", "env.C", "expected text"),
    ("about: x\npython: a\nsecrets: [A-B]\n", "secrets", "A-B"),
])
def test_a_mistake_in_a_stage_file(tmp_path: Path, text: str, key: str | None, said: str) -> None:
    write(tmp_path / "configs/stages/mine.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_stage("mine", tmp_path)
    assert caught.value.key == key and said in caught.value.what
    assert "configs/stages/mine.yaml:" in str(caught.value)


def test_a_stage_of_the_users_own(tmp_path: Path) -> None:
    write(tmp_path / "configs/stages/facelift.yaml",
          "about: theirs\ntorchrun: train_gslrm.py\nargs: [--config]\npaths: [data.list]\n"
          "resume: {glob: 'checkpoints/**/checkpoint-*', arg: '--resume_from_checkpoint {path}'}\n"
          "progress: {step: 'step (\\d+)'}\nresources: {gpus: 2}\n")
    write(tmp_path / "configs/runs/facelift/a.yaml", "data: {list: x.txt, sizes: [1, 2]}\nresources: {gpus: 4}\n")
    stage = load_stage("facelift", tmp_path)
    assert (stage.spec.kind, stage.spec.argv, stage.spec.passes_config(False)) == (
        "torchrun", ("train_gslrm.py", "--config"), True)
    assert isinstance(stage.spec.resume, ResumeGlob)

    run = load_run(stage, "a", ["data.sizes.1=3", "+optim.lr=1e-4"], tmp_path)
    assert run.data == {"data": {"list": "x.txt", "sizes": [1, 3]}, "optim": {"lr": 1e-4}}
    assert (run.typed, run.path_keys, run.resources.gpus) == (None, ("data.list",), 4)
    with pytest.raises(ConfigError) as caught:
        load_run(stage, "a", ["data.lst=y"], tmp_path)
    assert "nearest: data.list" in str(caught.value) and "+data.lst=" in str(caught.value)
    assert load_run(stage, None, [], tmp_path) == Resolved("facelift", {}, None, None, (), (), stage.spec.resources)


@pytest.mark.parametrize(("line", "sets", "passed"), [
    ("", [], False), ("", ["+lr=2"], True), ("default_config: a\n", [], True),
    ("default_config: a\npass_config: false\n", [], False), ("pass_config: true\n", [], True)])
def test_a_command_is_given_a_config_that_says_something(tmp_path: Path, line: str, sets: list[str], passed: bool) -> None:
    write(tmp_path / "configs/stages/own.yaml", f"about: theirs\ncommand: [python, train.py]\n{line}")
    write(tmp_path / "configs/runs/own/a.yaml", "lr: 1\n")
    stage = load_stage("own", tmp_path)
    assert stage.spec.passes_config(bool(load_run(stage, None, sets, tmp_path).data)) is passed


# --- cluster.yaml -------------------------------------------------------------------------------------

def test_cluster_yaml_is_found_and_typed(tmp_path: Path, own_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_cluster(tmp_path) is None
    write(own_world / ".config/launch/cluster.yaml", "nodes: {home: {via: ssh}}\n")
    assert set(load_cluster(tmp_path).nodes) == {"home"}
    text = (Path(configs.__file__).parent / "cluster.example.yaml").read_text()
    near = write(tmp_path / "configs/cluster.yaml", "ssh_config: ../ssh/config\n" + text)
    cluster = load_cluster(tmp_path / "deep")
    assert (cluster.source, Path(cluster.ssh_config).resolve()) == (str(near), tmp_path.resolve() / "ssh/config")
    gpu05, lab = cluster.nodes["gpu05"], cluster.nodes["lab"]
    assert isinstance(gpu05, SshNode) and gpu05.env == Environment(conda="mouse_facelift") and gpu05.gpus == "auto"
    assert isinstance(lab, SlurmNode) and lab.sbatch["account"] == "mouse"
    monkeypatch.setenv("LAUNCH_CLUSTER", str(tmp_path / "gone.yaml"))
    with pytest.raises(ConfigError, match="No such file"):
        load_cluster(tmp_path)


@pytest.mark.parametrize(("entry", "key", "said"), [
    ("a: {host: x}", "nodes.a.via", "is missing"),
    ("a: {via: shh}", "nodes.a.via", "must be local or ssh or slurm"),
    ("a: {via: ssh, hosst: x}", "nodes.a.hosst", "no such key"),
    ("a: {via: ssh, partition: x}", "nodes.a.partition", "no such key"),
    ("a: {via: ssh, env: {conda: x, venv: y}}", "nodes.a.env", "conda and venv"),
    ("a: {via: ssh, env: {venv: y, conda_base: z}}", "nodes.a.env.conda_base", "only beside"),
    ("a: {via: ssh, gpus: [0, x]}", "nodes.a.gpus.1", "expected a whole number"),
    ("a: {via: ssh, gpus: [-1]}", "nodes.a.gpus.0", ">= 0"),
    ("a: {via: ssh, share: all}", "nodes.a.share", "private"),
    ("a: {via: ssh, env_vars: {A: x, B: 4}}", "nodes.a.env_vars.B", "expected text"),
    ("a: {via: ssh, notify: [{slack: A}, {slack: A, on: [failure, stal]}]}", "nodes.a.notify.1.on.1",
     "must be end or failure or finding or stall"),
    ("a b: {via: ssh}", "nodes.a b", "letters"),
    ("any: {via: ssh}", "nodes.any", "meaning of its own"),
    ("local: {via: ssh}", "nodes.local", "always this computer"),
    ("a:", "nodes.a", "got nothing"),
])
def test_a_mistake_in_cluster_yaml(tmp_path: Path, entry: str, key: str, said: str) -> None:
    path = write(tmp_path / "configs/cluster.yaml", f"nodes:\n  {entry}\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(tmp_path)
    assert (caught.value.key, caught.value.where) == (key, f"{path}:2") and said in caught.value.what


@pytest.mark.parametrize(("text", "seconds"), [
    ("90", 90), ("90s", 90), ("30m", 1800), ("24h", 86400), ("1h30m", 5400), ("7d", 604800), ("1.5h", 5400),
    ("00:10:00", 600), ("1-00:00:00", 86400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "5x", "-5s", "1m5h x", "1 h", "1:2"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_a_value_is_found_by_its_path() -> None:
    assert look_up({"a": [{"b": 2}]}, ("a", "0", "b")) == 2
