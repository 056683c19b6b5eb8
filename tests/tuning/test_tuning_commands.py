"""certify, tune and generate --settings on the command line."""

from __future__ import annotations

import re
import shutil

import pytest
from typer.testing import CliRunner

import ldmfast
from ldmfast.caches import DeepCache, Guard, TaylorSeer, TeaCache, TGate
from ldmfast.cli import app
from ldmfast.cli_tuning import policies
from ldmfast.tuning import Settings
from ldmfast.tuning.tune import _Trials


def run(*words: str):
    return CliRunner().invoke(app, list(words))


def test_policies_are_written_as_in_python():
    assert policies(None) == ()
    assert policies("TaylorSeer(interval=(0, 4, 9), on='output') + DeepCache() + TGate(gate=3)") == (
        TaylorSeer(interval=(0, 4, 9), on="output"), DeepCache(), TGate(gate=3))
    (guard,) = policies("Guard(policy=TeaCache(threshold=0.5), limit=2)")
    assert guard == Guard(policy=TeaCache(threshold=0.5), limit=2)
    for text in ("DeepCache", "DeepCache(3)", "Deep(interval=3)", "__import__('os')", "DeepCache(interval=open('x'))",
                 "DeepCache(**{})", "DeepCache(", "DeepCache(width=3)"):
        with pytest.raises(ldmfast.LdmfastError, match="--cache"):
            policies(text)


def test_certify_and_generate_with_a_settings_file(tmp_path):
    prompts, file = tmp_path / "prompts.txt", tmp_path / "settings.json"
    prompts.write_text("a red circle\n")
    Settings(steps=4, cache=TaylorSeer(interval=2, on="output")).save(file)
    done = run("certify", "--prompts", str(prompts), "--settings", str(file), "--out", str(tmp_path / "out"), "--quiet")
    assert done.exit_code == 0, done.output
    assert re.search(r"network evaluations +20\.0 +3\.0 +6\.67x\n", done.output)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "certificate.html", "certificate.json", "certificate.png"]
    done = run("generate", "a red circle", "--settings", str(file), "--out", str(tmp_path / "a.png"), "--quiet")
    assert done.exit_code == 0 and "4 steps" in done.output and "promised: nothing" in done.output


def test_tune_tells_where_it_saved(tmp_path, monkeypatch):
    """Without --out: beside the model."""
    from ldmfast.pipelines.load import ASSETS

    folder, prompts = shutil.copytree(ASSETS / "tiny", tmp_path / "model"), tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 24)
    monkeypatch.setattr(_Trials, "search", lambda *a: (None, []))
    done = run("tune", str(folder), "--prompts", str(prompts), "--quiet")
    assert done.exit_code == 0 and f"written to {folder / 'ldmfast_settings.json'}\n" in done.output
    assert Settings.load(folder / "ldmfast_settings.json").promise is None
    assert "written to " not in (kept := run("tune", "tiny-lcm", "--quiet")).output and kept.exit_code == 0


@pytest.mark.parametrize("words, said", [
    (("certify", "--settings", "x.json", "--steps", "3"), "--settings sets what --steps would"),
    (("certify", "--settings", "absent.json"), "absent.json: no readable settings file"),
    (("certify", "path/to/model"), "--prompts is missing"),
    (("generate", "a", "--settings", "absent.json"), "absent.json: no readable settings file"),
    (("generate", "a", "--settings", "auto", "--precision", "int8"), "--settings sets what --precision would"),
    (("generate", "--from-png", "x.png", "--num", "4"), "'num' cannot be given beside it"),
    (("tune", "--out", "x.png", "--quiet"), "x.png: does not end in .json"),
    (("tune", "--budget", "-1", "--quiet"), "budget_s=-1.0 is not a positive number")])
def test_what_the_commands_refuse(words, said):
    done = run(*words)
    assert done.exit_code == 2 and said in done.output and done.output.count("\n") == 1
