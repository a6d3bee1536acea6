"""What the command line says of itself, and what it leaves alone: torch, transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from lm_service.settings import LanguageSettings
from lookonce import __version__
from lookonce.cli.settings_page import reference, settings_classes
from lookonce.cli.up import UpSettings
from lookonce.core.settings import command as make_command
from lookonce.core.settings import load, variable
from tests.cli.commands import environment, invoke, lookonce
from tests.processes import ROOT
from vision_service.settings import VisionSettings

WITHOUT_TORCH = """
import sys
sys.argv = ["lookonce", *sys.argv[1:]]
from lookonce.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", sorted({"torch", "transformers", "tokenizers", "huggingface_hub"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["ask", "--help"], ["demo", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout


def test_up_and_its_supervisor_load_no_torch():
    """Everything the supervising process runs, imported."""
    names = ["typer_app", "up", "system_plan", "supervisor", "health", "model", "system", "api", "checks", "demo"]
    code = "import sys\n" + "".join(f"import lookonce.cli.{name}\n" for name in names)
    code += "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", settings_classes())
def test_help_lists_every_setting_with_its_variable_and_default(command):
    settings = settings_classes()[command]
    if command == "lookonce up":
        shown = invoke("up", "--help").stdout
    else:  # what each __main__ runs, without the torch that its module imports
        shown = CliRunner().invoke(make_command(settings, lambda _: 0), ["--help"]).stdout
    shown = " ".join(shown.split())
    for name, field in settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown, name
        assert f"env: {variable(settings, name)}]" in shown, name
        assert field.description, name
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"default: {field.default}; env: {variable(settings, name)}]" in shown, name


@pytest.mark.parametrize("command", settings_classes())
def test_every_size_may_have_a_unit(command):
    settings = settings_classes()[command]
    sizes = [name for name in settings.model_fields if name.endswith("_bytes")]
    assert sizes
    required = {name: "x" for name, field in settings.model_fields.items() if field.is_required()}
    read = load(settings, required | dict.fromkeys(sizes, "4MiB"))
    assert {name: getattr(read, name) for name in sizes} == dict.fromkeys(sizes, 4 << 20)
    for name in sizes:
        with pytest.raises(typer.BadParameter, match=f"--{name.replace('_', '-')}='4 sheep'.*512MiB"):
            load(settings, required | {name: "4 sheep"})


@pytest.mark.parametrize(
    ("settings", "name"), [(VisionSettings, "tensor_cache_bytes"), (UpSettings, "vision_tensor_cache_bytes")]
)
def test_a_cache_can_be_switched_off(settings, name):
    assert getattr(load(settings, {"model": "x", name: "0"}), name) == 0
    with pytest.raises(typer.BadParameter, match="must be"):
        load(settings, {"model": "x", name: "-1"})


def test_a_setting_still_goes_by_its_former_name(monkeypatch):
    """As flag and as variable, each behind the new name."""
    seen = []
    app = make_command(LanguageSettings, lambda settings: seen.append(settings.tensor_cache_bytes) or 0)
    monkeypatch.setenv("LOOKONCE_LM_L1_BYTES", "3MiB")
    for flags in ([], ["--l1-bytes", "4MiB"], ["--tensor-cache-bytes", "5MiB"]):
        assert CliRunner().invoke(app, ["--model", "x", *flags]).exit_code == 0
    monkeypatch.setenv("LOOKONCE_LM_TENSOR_CACHE_BYTES", "6MiB")
    assert CliRunner().invoke(app, ["--model", "x"]).exit_code == 0
    assert seen == [size << 20 for size in (3, 4, 5, 6)]


def test_other_commands_name_their_variables():
    asked = invoke("ask", "--help").stdout
    for name in ("LOOKONCE_URL", "LOOKONCE_API_KEY", "LOOKONCE_MODEL", "LOOKONCE_DATA_DIR"):
        assert name in asked
    assert "LOOKONCE_STORE" in invoke("doctor", "--help").stdout


def test_settings_page_is_up_to_date():
    assert (ROOT / "docs" / "settings.md").read_text() == reference(), "run `make settings-docs`"


def test_version():
    done = lookonce("version")
    assert done.returncode == 0
    assert f"lookonce {__version__}" in done.stdout.splitlines()
    assert "\ntorch 2." in done.stdout


def test_version_as_a_flag():
    done = invoke("--version")
    assert (done.returncode, done.stdout) == (0, f"lookonce {__version__}\n")


def test_no_command_shows_help():
    assert "lookonce demo" in invoke().stdout + invoke().stderr


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["up", "--port", "70000"], {}, "--port='70000'"),
        (["up"], {"LOOKONCE_PORT": "many"}, "LOOKONCE_PORT='many'"),
        (["up", "--dtype", "int3"], {}, "--dtype='int3'"),
        (["up", "--grace", "soon"], {}, "--grace='soon'"),
        (["up", "--max-pixels", "0"], {}, "--max-pixels='0'"),
        (["frobnicate"], {}, "frobnicate"),
    ],
)
def test_bad_settings_name_themselves(arguments, env, said):
    done = invoke(*arguments, **env)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
